"""`kvcompress eval --text`: perplexity, KL and agreement of the original and the compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress.evaluate.perplexity import Evaluation
    from kvcompress_cli.eval_options import EvalOptions
    from kvcompress_cli.loading import Loaded
    from kvcompress_cli.sharing import Sharing

FAR = (
    "note: this text is far from what the maps were calibrated on, so that they lose more on it than they need to. "
    "Compress again with text like it: --calibration FILE."
)


def run(loaded: Loaded, options: EvalOptions) -> Evaluation:
    return measure(
        loaded,
        str(options.text),
        seq_len=options.seq_len or 2048,
        max_windows=options.max_windows,
        recent=options.recent,
        sinks=options.sinks,
    )


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


def show_shared(
    output: Path,
    mode: str,
    options: EvalOptions,
    *,
    base: str | None,
    device: str,
    dtype: str,
    shared: Sharing,
    json: bool,
) -> None:
    """Evaluate on a text, windows shared out; print the figures and keep them in `output`. Raises OptionError."""
    from kvcompress.errors import OptionError

    if mode != "--text":
        raise OptionError(
            f"--gpus and --ray share out the windows of --text; {mode} is not shared out. Leave them out."
        )
    shared.wake(device)  # before the seconds that importing torch takes
    from kvcompress.evaluate.shared import evaluate_shared
    from kvcompress.plan import Plan
    from kvcompress_cli.loading import resolve_device, resolve_dtype
    from kvcompress_cli.progress import stage_progress
    from kvcompress_cli.recording import record

    name = str(resolve_dtype(dtype, resolve_device(device), Plan.load(output).dtype)).removeprefix("torch.")
    how = {"seq_len": options.seq_len or 2048, "max_windows": options.max_windows}
    window = {"sinks": options.sinks, "recent": options.recent}
    with shared.at_work(device) as workers, stage_progress() as progress:
        assert workers is not None
        told = lambda done, total: progress("eval", done, total)  # noqa: E731
        found = evaluate_shared(
            output, str(options.text), workers, base=base, dtype=name, **how, **window, progress=told
        )
    if json:
        terminal.print_json(found.to_json())
    else:
        show(found)
    record(output, "perplexity", found.to_json())


def show(evaluation: Evaluation) -> None:
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
    if (distance := evaluation.distance) is not None:
        grid.add_row(
            "distance",
            f"components have {distance.component_energy:.2f} times the calibration text's energy, "
            f"{distance.gains_at_ends:.1%} of gains are at the ends ({distance.typical_gains_at_ends:.1%} there)",
        )
    terminal.stdout().print(grid)
    if distance is not None and distance.is_far:
        typer.echo(FAR, err=True)
