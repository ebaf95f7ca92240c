"""`kvcompress bench --engine vllm`: what is asked for, and the table of what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from kvcompress.bench.engine import EngineTiming


def bench_engine(
    *, shape: str, keeps: list[float], contexts: list[int], batches: list[int], turn: int, caches: str, device: str,
    json: bool,
) -> None:  # fmt: skip
    """Time vLLM's own caches and ours: each batch at each context, the most sequences at the longest, and its
    prompt. Raises OptionError where vLLM is not installed, or where no cache runs in it."""
    import sys

    import torch

    from kvcompress.bench.engine import EngineWorkload, time_engine
    from kvcompress.errors import OptionError
    from kvcompress.vllm.plugin import installed_version

    installed_version()
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    longest = max(contexts)
    sequences = [(batch, context) for context in contexts for batch in batches]
    workload = EngineWorkload((*sequences, (None, longest)), prompt=longest, continuation=min(2048, longest // 2))
    rows = time_engine(
        shape, keeps, workload, caches=[c for c in caches.split(",") if c], turn=turn, device=where,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if json:
        terminal.print_json({"shape": shape, "engine": "vllm", "caches": [row.to_json() for row in rows]})
    else:
        print_engine(rows)
    if all(row.failure is not None for row in rows):
        raise OptionError(f"none of the caches ran in vLLM: {rows[0].failure}")


def print_engine(rows: list[EngineTiming]) -> None:
    """Print a line for each cache and workload; a cache that did not run says why."""
    table = terminal.table("cache", ">tokens that fit", ">batch", ">context", ">ms a step", ">tokens/s")
    for row in rows:
        name = row.cache if row.keep is None else f"{row.cache} {row.keep:g}"
        if row.failure is not None:
            table.add_row(name, f"did not run: {row.failure}", "", "", "", "")
        for step in row.steps:
            table.add_row(name, f"{row.tokens_that_fit:,}", *_cells(step))
    terminal.stdout().print(table)
    grid = terminal.facts()
    for row in rows:
        if row.first_token_seconds is not None and row.continued_seconds is not None:
            seconds = f"{row.first_token_seconds:.3f} s; {row.continued_seconds:.3f} s of what follows it in the cache"
            grid.add_row(f"{row.cache}, first token of the longest prompt", seconds)
    grid.add_row("device", next((row.device for row in rows if row.device), "-"))
    terminal.stdout().print(grid)


def _cells(step: dict[str, Any]) -> list[str]:
    most = " (most)" if step["most"] else ""
    return [
        f"{step['batch']}{most}",
        terminal.tokens(step["context"]),
        f"{step['milliseconds']:.2f}",
        f"{step['tokens_per_second']:.0f}",
    ]
