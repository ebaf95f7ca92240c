"""`kvcompress bench --engine vllm`: what is asked for, and the table of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress.bench.engine import EngineTiming


def bench_engine(
    *, output: Path | None, shape: str, keeps: list[float], contexts: list[int], batches: list[int], turn: int,
    caches: str, limit: float | None, device: str, json: bool,
) -> None:  # fmt: skip
    """Time vLLM's own caches and ours: each batch at each context, the most sequences at the longest, and its
    prompt. Raises OptionError where vLLM is not installed, or where no cache runs in it."""
    import sys

    import torch

    from kvcompress.bench.engine import EngineOptions, EngineWorkload, time_checkpoint, time_engine
    from kvcompress.errors import OptionError
    from kvcompress.vllm.plugin import installed_version

    installed_version()
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    longest = max(contexts)
    sequences = [(batch, context) for context in contexts for batch in batches]
    workload = EngineWorkload((*sequences, (None, longest)), prompt=longest, continuation=min(2048, longest // 2))
    options = EngineOptions(where, limit=limit, say=lambda line: print(line, file=sys.stderr, flush=True))
    own = [cache for cache in caches.split(",") if cache]
    if output is None:
        rows = time_engine(shape, keeps, workload, caches=own, turn=turn, options=options)
    else:
        rows = time_checkpoint(output, workload, caches=own, options=options)
    if json:
        model = {"shape": shape} if output is None else {"checkpoint": str(output)}
        terminal.print_json({**model, "engine": "vllm", "caches": [row.to_json() for row in rows]})
    else:
        print_engine(rows)
    if not any(row.steps for row in rows):
        raise OptionError(f"none of the caches ran in vLLM: {rows[0].failure}")


def print_engine(rows: list[EngineTiming]) -> None:
    """Print a line for each cache and workload, times to a first token, and why a cache did not run to its end."""
    from rich.markup import escape

    from kvcompress.bench.engine import name_of

    table = terminal.table("cache", ">tokens that fit", ">batch", ">context", ">ms a step", ">tokens/s")
    grid = terminal.facts()
    for row in rows:
        name, fit = name_of(row.cache, row.keep), f"{row.tokens_that_fit:,}" if row.tokens_that_fit else "-"
        for step in row.steps:
            table.add_row(name, fit, *_cells(step))
        if not row.steps:
            table.add_row(name, fit, *"----")
        if row.first_token_seconds is not None:
            after = row.continued_seconds
            more = "" if after is None else f"; {after:.3f} s of what follows it in the cache"
            grid.add_row(f"{name}, first token of the longest prompt", f"{row.first_token_seconds:.3f} s{more}")
    for row in rows:
        if row.failure is not None:
            ran = "ended early" if row.steps else "did not run"
            grid.add_row(f"{name_of(row.cache, row.keep)} {ran}", escape(row.failure))
    grid.add_row("device", next((row.device for row in rows if row.device), "-"))
    terminal.stdout().print(table)
    terminal.stdout().print(grid)


def _cells(step: dict[str, Any]) -> list[str]:
    most = " (most)" if step["most"] else ""
    return [
        f"{step['batch']}{most}",
        terminal.tokens(step["context"]),
        f"{step['milliseconds']:.2f}",
        f"{step['tokens_per_second']:.0f}",
    ]
