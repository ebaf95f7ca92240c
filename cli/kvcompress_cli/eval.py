"""`kvcompress eval`: what the compressed cache costs on a text, decode-faithful."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress_cli import flags, terminal
from kvcompress_cli.peers import NAMES, show_peer

if TYPE_CHECKING:
    from kvcompress.evaluate.perplexity import Evaluation
    from kvcompress_cli.loading import Loaded


def evaluate(
    output: flags.CompressedDirectory,
    text: Annotated[str, typer.Option(metavar="TEXT", help="Text file, JSONL, directory or datasets id.")],
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window; each window stands alone.")] = 2048,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many windows.", show_default="the whole text")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=0, help="Latest tokens that stay exact.", show_default="as compressed")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(min=0, help="First tokens that stay exact.", show_default="as compressed")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Measure this cache on an uncompressed model instead: {NAMES}."),
    ] = None,
    base: flags.Base = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    json: flags.Json = False,
) -> None:
    """Compare the perplexity with the uncompressed model on a text that was not used for calibration.

    Every token attends to the compressed form of all tokens older than the window, as in generation. The figures are
    kept in OUT (evaluations.json and its model card), for kvcompress report.
    """
    from kvcompress.errors import OptionError
    from kvcompress_cli.loading import load_compressed
    from kvcompress_cli.recording import record

    if cache is not None:
        if sinks is not None or base is not None:
            raise OptionError("--cache measures an uncompressed model: leave out --sinks and --base.")
        window = {"seq_len": seq_len, "max_windows": max_windows, "residual": recent}
        show_peer(str(output), cache, text, **window, device=device, dtype=dtype, json=json)
        return
    loaded = load_compressed(output, base=base, device=device, dtype=dtype, with_original=True)
    evaluation = measure(loaded, text, seq_len=seq_len, max_windows=max_windows, recent=recent, sinks=sinks)
    if json:
        terminal.print_json(evaluation.to_json())
    else:
        print_evaluation(evaluation)
    record(output, "perplexity", evaluation.to_json())


def measure(
    loaded: Loaded,
    text: str,
    *,
    seq_len: int,
    max_windows: int | None,
    recent: int | None = None,
    sinks: int | None = None,
) -> Evaluation:
    """Return the library's evaluation, with progress on stderr."""
    from kvcompress.evaluate.perplexity import evaluate as evaluate_model
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_model(
            loaded.model,
            loaded.tokenizer,
            text,
            original=loaded.original,
            seq_len=seq_len,
            max_windows=max_windows,
            recent=recent,
            sinks=sinks,
            progress=lambda done, total: progress("eval", done, total),
        )


def print_evaluation(evaluation: Evaluation) -> None:
    from rich.markup import escape

    perplexity, protocol = evaluation.perplexity, evaluation.protocol
    grid = terminal.facts()
    grid.add_row("perplexity, original", f"{perplexity['original']:.4f}")
    grid.add_row("perplexity, compressed", f"{perplexity['compressed']:.4f}")
    grid.add_row("ratio", f"[bold]{perplexity['ratio']:.4f}[/bold]")
    grid.add_row("KL to the original", f"{evaluation.kl_nats:.5f} nats a token")
    grid.add_row("same most likely token", f"{evaluation.top1_agreement:.2%}")
    grid.add_row("keep", f"{evaluation.keep:.4f} of the cache's bytes, beyond the window")
    grid.add_row(
        "protocol",
        f"{escape(protocol['text'])} (sha256 {protocol['text_sha256'][:12]}), {protocol['windows']} windows of "
        f"{protocol['seq_len']}, {protocol['sinks']} sinks, {protocol['recent']} recent, {protocol['dtype']}",
    )
    terminal.stdout().print(grid)
