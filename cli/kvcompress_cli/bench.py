"""`kvcompress bench`: how fast attention over the packed cache is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.bench.attention import AttentionTiming
    from kvcompress.bench.decode import DecodeTiming
    from kvcompress.bench.pages import ChunkTiming, PagedTiming


#: Options that do nothing, by what they are given with or without.
_IDLE = {
    "with OUT": ("shape", "keep", "ranks_only", "turn"),
    "with --engine": ("ranks_only", "memory", "decode", "decode_batch", "pages"),
    "without --engine": ("caches", "limit"),
    "without --decode": ("decode_batch",),
}


def bench(
    command: typer.Context,
    output: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="A directory made by kvcompress compress.", show_default=False),
    ] = None,
    shape: Annotated[str, typer.Option(help="Without OUT: a known shape, filled with random numbers.")] = "llama-3-8b",
    keep: Annotated[str, typer.Option(help="Without OUT: shares of the cache's bytes, with commas between.")] = "0.125",
    ranks_only: Annotated[bool, typer.Option("--ranks-only", help="Without OUT: 16 bits for every component.")] = False,
    context: Annotated[str, typer.Option(help="Context lengths, with commas between.")] = "8192,32768,131072",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8,32",
    turn: Annotated[
        int,
        typer.Option(
            min=1, help="Without OUT: tokens of a turn, as in kvcompress compress; 1: keys that commute with RoPE."
        ),
    ] = 256,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for weights and cache, for the largest batch.")
    ] = "140GB",
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode end to end, with a model of random weights.")
    ] = False,
    decode_batch: Annotated[
        int | None,
        typer.Option(min=1, help="With --decode: sequences, instead of the most that fit.", show_default=False),
    ] = None,
    pages: Annotated[
        bool, typer.Option("--pages", help="Also time the same tokens in pages, as an engine keeps them (GPU).")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(metavar="vllm", help="Time whole caches in vLLM instead, of OUT or with random weights."),
    ] = None,
    caches: Annotated[
        str, typer.Option(help="With --engine: vLLM's own caches to time, by kv_cache_dtype, with commas between.")
    ] = "bf16",
    limit: Annotated[
        float | None,
        typer.Option(min=1, help="With --engine: seconds that each cache may take, its start too.", show_default=False),
    ] = None,
    device: flags.Device = "auto",
    json: flags.Json = False,
) -> None:
    """Time one layer's attention against torch's fastest over the uncompressed cache, and packing a prompt.

    On a GPU the kernels are timed, on a CPU the torch reference, in the same run as their opponents.
    With --decode a model of the shape decodes, too, at the largest batch that fits the device with each cache.
    """
    given = {"OUT": output is not None, "--engine": engine is not None, "--decode": decode}
    for when, names in _IDLE.items():
        if given[when.split()[1]] == when.startswith("with "):
            flags.refuse_idle(command, names, when)
    if engine is not None:
        _bench_engine(engine, output, shape, keep, context, batch, turn, caches, limit, device, json)
        return
    from kvcompress.bench.run import run_bench

    document = run_bench(
        output=output, shape=shape, keeps=_numbers(keep, float, "--keep"), ranks_only=ranks_only,
        contexts=_numbers(context, int, "--context"), batches=_numbers(batch, int, "--batch"),
        turn=turn, memory_gb=_gigabytes(memory), device=device, decode=decode, decode_batch=decode_batch, pages=pages,
    )  # fmt: skip
    if json:
        terminal.print_json(document.to_json())
    else:
        print_attention(document.attention)
        if decode:
            print_decode(document.decode)
        if pages:
            print_pages(document.pages, document.chunks)
        _print_rest(document)


def _gigabytes(memory: str) -> float:
    """Return the GB of a size, as compress --memory takes it; of a number alone, too."""
    from kvcompress.calibration.memory import parse_bytes

    return parse_bytes(f"{memory}GB" if memory.strip()[-1:].isdigit() else memory) / 1e9


def _bench_engine(
    engine: str, output: Path | None, shape: str, keep: str, context: str, batch: str, turn: int, caches: str,
    limit: float | None, device: str, json: bool,
) -> None:  # fmt: skip
    from kvcompress.errors import OptionError
    from kvcompress_cli.bench_engine import bench_engine

    if engine != "vllm":
        raise OptionError(f"--engine {engine} is unknown. Known: vllm.")
    bench_engine(
        output=output, shape=shape, keeps=_numbers(keep, float, "--keep"), contexts=_numbers(context, int, "--context"),
        batches=_numbers(batch, int, "--batch"), turn=turn, caches=caches, limit=limit, device=device, json=json,
    )  # fmt: skip


def print_attention(rows: list[AttentionTiming]) -> None:
    columns = ">keep", ">context", ">batch", ">ours", ">SDPA", "by", ">faster", ">roofline", "bound by"
    table = terminal.table(*columns, title="microseconds")
    table.collapse_padding = True  # so that it fits 80 columns
    for row in rows:
        table.add_row(
            f"{row.keep:.3g}",
            terminal.tokens(row.context),
            str(row.batch),
            f"{row.microseconds:.0f}",
            f"{row.sdpa_microseconds[row.opponent]:.0f}",
            row.opponent,
            f"[bold]{row.speedup:.2f}x[/bold]",
            f"{row.roofline_microseconds:.1f}",
            row.bound_by,
        )
    terminal.stdout().print(table)


def print_decode(rows: list[DecodeTiming]) -> None:
    """Print one line for every cache; the batch that bytes alone would allow stands beside the one that ran."""
    table = terminal.table("cache", ">keep", ">context", ">batch", ">computed", ">ms a step", ">tokens/s", ">faster")
    for row in rows:
        table.add_row(
            row.cache,
            f"{row.keep:.3g}",
            terminal.tokens(row.context),
            str(row.batch),
            str(row.computed_batch),
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:.0f}",
            "-" if row.speedup is None else f"[bold]{row.speedup:.2f}x[/bold]",
        )
    terminal.stdout().print(table)


def print_pages(rows: list[PagedTiming], chunks: list[ChunkTiming]) -> None:
    table = terminal.table(">keep", ">context", ">batch", ">pages, us", ">one tensor", ">schedule, once a step")
    for row in rows:
        table.add_row(
            f"{row.keep:.3g}",
            terminal.tokens(row.context),
            str(row.batch),
            f"{row.microseconds:.1f}",
            f"{row.contiguous_microseconds:.1f}",
            f"{row.schedule_microseconds:.0f}",
        )
    terminal.stdout().print(table)
    table = terminal.table(">keep", ">cached", ">new", ">ours, ms", ">uncompressed", ">rebuilding")
    for row in chunks:
        times = row.microseconds, row.exact_microseconds, row.rebuild_microseconds
        table.add_row(
            f"{row.keep:.3g}",
            terminal.tokens(row.context),
            terminal.tokens(row.n_new),
            *(f"{t / 1e3:.2f}" for t in times),
        )
    terminal.stdout().print(table)


def _print_rest(document: Any) -> None:
    grid = terminal.facts()
    grid.add_row("device", document.device)
    grid.add_row("copy, read and written", f"{document.copy_bytes_per_second / 1e9:.1f} GB/s")
    grid.add_row("matrix product", f"{document.matrix_flops_per_second / 1e9:.0f} GFLOP/s")
    how = "encoded after RoPE" if document.turn == 1 else f"un-rotated in turns of {document.turn} tokens"
    grid.add_row("keys", how)
    for keep, counts in document.counts.items():
        grid.add_row(f"components at {keep}", ", ".join(f"{n} of {bits} bits" for bits, n in counts["key"].items()))
    for row in document.prefill:
        grid.add_row(
            f"packing {terminal.tokens(row.context)} tokens",
            f"{row.encode_milliseconds:.2f} ms a layer, {row.share:.1%} of its prefill",
        )
    for line in document.fits:
        grid.add_row(
            f"sequences of {terminal.tokens(line['context'])} in {line['memory_gb']:g} GB",
            f"{line['compressed']} at keep {line['keep']:.3g}, {line['uncompressed']} uncompressed (computed)",
        )
    terminal.stdout().print(grid)


def _numbers(text: str, kind: Any, option: str) -> list[Any]:
    from kvcompress.errors import OptionError

    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{option} {text}: numbers with commas between them are expected.") from error
    if not all(number > 0 for number in numbers):
        raise OptionError(f"{option} {text}: every number must be above 0.")
    return numbers
