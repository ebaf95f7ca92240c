"""What `compress` and `demo` do once they know the options: compress with progress on stderr, and tell the result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvcompress.options import CompressOptions
from kvcompress_cli import terminal
from kvcompress_cli.sharing import Sharing, n_bytes

if TYPE_CHECKING:
    from kvcompress.evaluate.max_ratio import Search
    from kvcompress.pipeline import CompressionResult


def run(
    model: str,
    output: Path,
    options: CompressOptions,
    *,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    shared: Sharing | None = None,
    memory: str | None = None,
) -> CompressionResult:
    """Return compress()'s result, with progress on stderr."""
    shared = shared or Sharing()
    _check(output, force, device, dtype, shared)
    from kvcompress.pipeline import compress as compress_checkpoint
    from kvcompress_cli.progress import stage_progress

    how: dict[str, Any] = {"device": device, "dtype": dtype, "resume": resume, "force": force}
    how["memory"] = n_bytes(memory)
    with shared.at_work(device) as workers, stage_progress() as progress:
        return compress_checkpoint(model, output, options, **how, workers=workers, progress=progress)


def search_keep(
    model: str,
    output: Path,
    options: CompressOptions,
    max_ratio: float,
    *,
    texts: tuple[str, ...],
    device: str,
    dtype: str,
    resume: bool,
    force: bool,
    shared: Sharing,
) -> tuple[CompressionResult, Search]:
    """Return compress_within()'s result, with progress on stderr."""
    _check(output, force, device, dtype, shared)
    from kvcompress.evaluate.max_ratio import compress_within
    from kvcompress_cli.progress import stage_progress

    how: dict[str, Any] = {"device": device, "dtype": dtype, "resume": resume, "force": force}
    with shared.at_work(device) as workers, stage_progress() as progress:
        how |= {"workers": workers, "progress": progress}
        return compress_within(model, output, options, max_ratio, texts=texts, **how)


def _check(output: Path, force: bool, device: str, dtype: str, shared: Sharing) -> None:
    from kvcompress.checkpoint.writer import check_target

    check_target(output, force=force)  # before the seconds that importing torch takes
    shared.wake(device)
    from kvcompress_cli.loading import check_dtype, resolve_device

    resolve_device(device)
    check_dtype(dtype)


def result_document(result: CompressionResult) -> dict[str, Any]:
    """Return what --json prints."""
    from kvcompress.report.document import summary

    figures = summary(result.plan)
    layers: list[dict[str, Any]] = [{"layer": i} for i in range(result.plan.n_layers)]
    for site in result.plan.sites:
        layers[site.layer][site.part] = {"rank": site.rank, "width": site.width}
    return {
        "keep": figures["keep"],
        "bytes_per_token": figures["bytes_per_token"],
        "predicted_loss_nats": figures["predicted_loss_nats"],
        "layers": layers,
        "seconds": result.seconds,
        "output": str(result.output),
    }


def print_result(result: CompressionResult) -> None:
    """Say what was kept, what that costs, and which commands come next."""
    from kvcompress.report.document import summary
    from kvcompress_cli.report import add_budget

    grid = terminal.facts()
    add_budget(grid, summary(result.plan))
    typer.echo(f"wrote {result.output} ({result.plan.form} form) in {result.seconds:.1f} s\n")
    terminal.stdout().print(grid)
    out = shlex.quote(str(result.output))
    typer.echo(f"\nkvcompress report {out}\nkvcompress eval {out} --text FILE")
    typer.echo(f'kvcompress generate {out} --prompt "Once upon a time"')
    if result.plan.form == "folded":
        typer.echo(f"kvcompress export {out} --to hf -o DIR")


def check_runs_in_vllm(model: str) -> None:
    """Raise OptionError, before anything is measured, for a model whose compressed cache the plugin refuses.

    Not of a GGUF file, which would be read twice.
    """
    from kvcompress.checkpoint.reader import open_headers
    from kvcompress.vllm import refusals

    if Path(model).is_file():
        return
    with open_headers(model) as checkpoint:
        spec, config = checkpoint.spec, checkpoint.config.get("text_config") or checkpoint.config
        found = refusals.of_config(config, spec.own_layers, window=spec.window)
        found = found or refusals.of_tensors(checkpoint.tensors, {a.layer for a in spec.layers})
    refusals.refuse(found, "Leave out --for.")


def in_engine(result: CompressionResult) -> dict[str, Any]:
    """Return what a token takes in vLLM's pages, padding included, and how many times the tokens fit, window and all.

    times_the_tokens: by the length of the sequences.
    """
    from kvcompress.vllm.pages import PoolBlock

    block = PoolBlock.of(result.plan)
    return {
        "bytes_per_token": {"original": block.own_bytes, "compressed": block.bytes_per_token},
        "page_tokens": block.n_tokens,
        "times_the_tokens": {str(n): block.times_the_tokens(n) for n in (2048, 32768)},
    }


def print_in_engine(figures: dict[str, Any]) -> None:
    """Say what `in_engine` found."""
    taken = figures["bytes_per_token"]
    times = ", ".join(f"{n:.2f} at {terminal.tokens(int(at))}" for at, n in figures["times_the_tokens"].items())
    terminal.stdout().print(
        f"in vLLM: {taken['compressed']:,.0f} bytes a token in pages of {figures['page_tokens']} tokens, against "
        f"{taken['original']:,}; times the tokens that fit in sequences: {times}",
        highlight=False,
    )
