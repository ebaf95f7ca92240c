"""`kvcompress eval --retrieval`, `--by-position` and `--generation`: how a long context survives compression."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress.evaluate.generation import Agreement
    from kvcompress.evaluate.positions import PositionBin, Positions
    from kvcompress.evaluate.retrieval import Retrieval
    from kvcompress_cli.eval_options import EvalOptions


#: Text for questions that do not depend on what the text says.
_ANY_TEXT = "builtin:prose"


def runner(mode: str, options: EvalOptions) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    """Return (what turns a loaded model into a result, what prints that). Raises OptionError for a bad list."""
    if mode == "--retrieval":
        grid: dict[str, list[Any]] = {}
        if options.lengths is not None:
            grid["lengths"] = _numbers("--lengths", options.lengths, int)
        if options.depths is not None:
            grid["depths"] = _numbers("--depths", options.depths, float)
        return (lambda loaded: run_retrieval(loaded, options, grid)), show_retrieval
    if mode == "--by-position":
        return (lambda loaded: run_positions(loaded, options)), show_positions
    return (lambda loaded: run_generation(loaded, options)), show_generation


def run_retrieval(loaded: Any, options: EvalOptions, grid: dict[str, list[Any]]) -> Retrieval:
    """grid: lengths and depths, where they were given."""
    from kvcompress.evaluate.retrieval import evaluate_retrieval
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_retrieval(
            loaded.model,
            loaded.tokenizer,
            options.text or _ANY_TEXT,
            **grid,
            n_prompts=options.prompts or 10,
            original=loaded.original,
            batch_size=options.batch_size or 8,
            answers=options.answers,
            sinks=options.sinks,
            recent=options.recent,
            progress=progress,
        )


def run_positions(loaded: Any, options: EvalOptions) -> Positions:
    from kvcompress.compat import context_length
    from kvcompress.evaluate.positions import evaluate_positions
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_positions(
            loaded.model,
            loaded.tokenizer,
            str(options.text),
            seq_len=options.seq_len or min(8192, context_length(loaded.model)),
            max_windows=options.max_windows,
            original=loaded.original,
            sinks=options.sinks,
            recent=options.recent,
            progress=lambda done, total: progress("eval", done, total),
        )


def run_generation(loaded: Any, options: EvalOptions) -> Agreement:
    from kvcompress.evaluate.generation import evaluate_generation
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_generation(
            loaded.model,
            loaded.tokenizer,
            options.text or _ANY_TEXT,
            prompt_tokens=options.prompt_tokens or 512,
            new_tokens=options.new_tokens or 128,
            n_prompts=options.prompts or 8,
            batch_size=options.batch_size or 8,
            original=loaded.original,
            progress=lambda done, total: progress("generate", done, total),
        )


def show_retrieval(result: Retrieval) -> None:
    """Print, for each kind, one row a length: found by the original and by the compressed model at each depth."""
    console = terminal.stdout()
    depths = result.protocol["depths"]
    for kind, found in result.found.items():
        title = f"{kind}: found by the original / compressed, by depth"
        table = terminal.table(">tokens", *(f">{depth:g}" for depth in depths), ">all", title=title)
        for length in result.protocol["lengths"]:
            cells = [c for c in result.cells if (c.kind, c.length) == (kind, length)]
            both = [(c.original, c.compressed) for c in cells]
            both.append((sum(a for a, _ in both) / len(both), sum(b for _, b in both) / len(both)))
            table.add_row(f"{length:,}", *(f"{a:.0%} / {b:.0%}" for a, b in both))
        console.print(table)
        logprob = result.logprob[kind]
        console.print(
            f"all {kind} prompts: {found.difference:+.1%} found (p {found.p_value:.2f}), the answer's log-likelihood "
            f"{logprob.difference:+.3f} nats (p {logprob.p_value:.2f})\n"
        )
    _print_protocol(result, f"{result.protocol['n_prompts']} prompts a cell")


def show_positions(result: Positions) -> None:
    console = terminal.stdout()
    for title, bins in (("by quarters of the context", result.quarters), ("by distance", result.doubling)):
        table = terminal.table("positions", ">original", ">compressed", ">ratio", title=f"perplexity {title}")
        for row in bins:
            table.add_row(*_bin_cells(row))
        console.print(table)
    error = f" ± {result.last_over_first_stderr:.4f}" if result.last_over_first_stderr is not None else ""
    console.print(f"ratio in the last quarter over that in the first: [bold]{result.last_over_first:.4f}[/bold]{error}")
    _print_protocol(result, f"{result.protocol['windows']} windows of {result.protocol['seq_len']:,}")


def show_generation(result: Agreement) -> None:
    protocol = result.protocol
    grid = terminal.facts()
    grid.add_row(
        "common prefix",
        f"{result.common_prefix:.1f} of {protocol['new_tokens']} tokens (median {result.median_prefix:.1f})",
    )
    grid.add_row("continued alike to the end", f"{result.identical:.1%} of the prompts")
    grid.add_row("same token at the same place", f"{result.same_place:.1%}")
    grid.add_row("same next token, given the original's text", f"{result.next_token:.1%}")
    terminal.stdout().print(grid)
    _print_protocol(result, f"{protocol['prompts']} prompts of {protocol['prompt_tokens']:,} tokens, greedy")


def _bin_cells(row: PositionBin) -> tuple[str, str, str, str]:
    error = f" ± {row.ratio_stderr:.4f}" if row.ratio_stderr is not None else ""
    return (
        f"{row.start:,} to {row.stop - 1:,}",
        f"{row.original:.3f}",
        f"{row.compressed:.3f}",
        f"{row.ratio:.4f}{error}",
    )


def _print_protocol(result: Any, what: str) -> None:
    from rich.markup import escape

    p = result.protocol
    terminal.stdout().print(
        f"[dim]keep {result.keep:.4f}; {escape(p['text'])}, {what}; {p['sinks']} sinks, {p['recent']} recent, "
        f"{p['dtype']}[/dim]"
    )


def _numbers(option: str, given: str, kind: type) -> list[Any]:
    from kvcompress.errors import OptionError

    try:
        return [kind(part) for part in given.split(",") if part.strip()]
    except ValueError as error:
        raise OptionError(f"{option} takes numbers with commas between them, found '{given}'.") from error
