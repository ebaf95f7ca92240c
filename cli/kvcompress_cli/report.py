"""`kvcompress report`: what each layer kept, and what it is predicted to cost, from report.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PARTS = ("key", "value")


def report(
    output: flags.CompressedDirectory,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with charts, complete in one file, instead of the table."),
    ] = None,
    json: flags.Json = False,
) -> None:
    """Show ranks, bits and the predicted loss of every layer, for keys and values, and the sizes in all.

    A rank is how many components of a site remain for each token beyond the recent window; bits are stored bits for
    each number that the model caches. The page of --html shows what kvcompress eval measured as well.
    """
    from kvcompress.report.stored import read_report

    document = read_report(output)
    if html:
        write_page(output, document, html)
    if json:
        terminal.print_json(document)
    elif html:
        typer.echo(f"wrote {html}")
    else:
        print_report(document)


def write_page(output: Path, document: dict[str, Any], target: Path) -> None:
    """Write the page about an output, whole or not at all. Raises a KVCompressError."""
    from kvcompress.checkpoint.writer import atomic_file
    from kvcompress.errors import CheckpointError, OutputError
    from kvcompress.evaluations import read_evaluations
    from kvcompress.report.page import report_page

    if target.is_dir():
        raise OutputError(f"{target} is a directory. Name a file, such as {target / 'report.html'}.")
    try:
        page = report_page(document, read_evaluations(output), name=output.absolute().name)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{output} has a damaged report or evaluation ({error!r}). Compress again.") from error
    with atomic_file(target) as scratch:
        scratch.write_text(page, encoding="utf-8")


def print_report(document: dict[str, Any]) -> None:
    console = terminal.stdout()
    console.print(layer_table(document, ascii_only=console.options.ascii_only))
    console.print(totals(document))
    print_healing(console, document.get("healing", []))
    if "search" in document:
        console.print(search_table(document["search"]))


def print_healing(console: Console, stages: list[dict[str, Any]]) -> None:
    """Print what was trained after the compression, and what that gave."""
    from kvcompress.report.healing import healing_rows, healing_words

    for stage in stages:
        console.print(f"\n{healing_words(stage)}", soft_wrap=True)
        table = terminal.table("held-out text", ">ratio before", ">after", ">KL before, nats", ">after")
        for row in healing_rows(stage):
            table.add_row(*row)
        console.print(table)


def layer_table(document: dict[str, Any], *, ascii_only: bool = False) -> Table:
    """Return a row for each layer: ranks, bits a number, losses with bars relative to the largest."""
    losses = [row[part]["predicted_loss"] for row in document["layers"] for part in _PARTS]
    largest = max(losses) or 1.0
    unit = "nats" if document["predicted_loss_nats"] is not None else "relative"
    loss = f"loss, {unit}"
    table = terminal.table(">layer", ">key rank", ">bits", loss, ">value rank", ">bits", loss)
    for row in document["layers"]:
        cells = [str(row["layer"])]
        for part in _PARTS:
            site = row[part]
            ranks = f"{site['rank']}/{site['width']}"
            cost = terminal.bar(site["predicted_loss"] / largest, 3, ascii_only=ascii_only)
            bits = f"{site['bits_per_token'] / site['width']:.2f}"
            cells += [ranks, bits, f"{site['predicted_loss']:7.1e} [yellow]{cost}[/yellow]"]
        table.add_row(*cells)
    return table


def search_table(search: dict[str, Any]) -> Table:
    """Return the budgets that --max-ratio measured, smallest last, and the text on which each lost most."""
    table = terminal.table(">keep", ">largest ratio + error", "on", f"at most {search['max_ratio']:g}")
    for step in sorted(search["steps"], key=lambda s: -s["keep"]):
        errors = step.get("errors", {})
        bounds = {kind: ratio + errors.get(kind, 0) for kind, ratio in step["ratios"].items()}
        worst = max(bounds, key=bounds.__getitem__, default="no room for anything")
        ratio = "" if step["worst"] is None else f"{step['worst']:.4f}"
        verdict = "chosen" if step["keep"] == search["keep"] else "yes" if step["enough"] else "no"
        table.add_row(f"{step['keep']:.4f}", ratio, escape(Path(worst).name), verdict)
    return table


def totals(document: dict[str, Any]) -> Table:
    """Return the figures of the whole model."""
    grid = terminal.facts()
    add_budget(grid, document)
    grid.add_row("components", _levels(document))
    for entry in document["cache_bytes"]:
        grid.add_row(
            f"cache at {terminal.tokens(entry['tokens'])}",
            f"{terminal.size(entry['compressed'])} instead of {terminal.size(entry['original'])}",
        )
    grid.add_row("", f"with {document['sinks']} sinks and {document['recent']} recent tokens kept exact")
    flops = document["flops_per_cached_token"]
    grid.add_row(
        "arithmetic",
        f"{flops['rebuild_keys']:,} flops to rebuild a cached token's keys; "
        f"{flops['attention_on_latent_values']:,} a query head for its values",
    )
    return grid


def _levels(document: dict[str, Any]) -> str:
    """Return how many components have how many bits, over all sites."""
    counts: Counter[int] = Counter()
    for row in document["layers"]:
        for part in _PARTS:
            counts.update({int(bits): n for bits, n in row[part].get("bits_histogram", {}).items()})
    total = sum(row[part]["width"] for row in document["layers"] for part in _PARTS)
    stored = ", ".join(f"{counts[bits]:,} of {bits} bits" for bits in sorted(counts, reverse=True))
    return f"{stored or 'none'}; {total - sum(counts.values()):,} dropped" if counts else "not in this report"


def add_budget(grid: Table, figures: dict[str, Any]) -> None:
    """Add what was asked for, what was got and what it costs, from the report's figures of the whole model."""
    per_token, maps, loss = figures["bytes_per_token"], figures["maps"], figures["predicted_loss_nats"]
    grid.add_row("keep", f"{figures['keep']:.4f} (asked for {figures['keep_asked']})")
    grid.add_row("bytes a token", f"{per_token['compressed']:,} of {per_token['original']:,}")
    grid.add_row("budget left", f"{figures['bytes_left_per_token']:,} bytes a token")
    in_nats = "not in nats (no Fisher information)" if loss is None else f"{loss:.4f} nats a token"
    grid.add_row("predicted loss", in_nats)
    grid.add_row("maps", f"{terminal.size(maps['bytes'])}, {maps['share_of_weights']:.2%} of the weights")
