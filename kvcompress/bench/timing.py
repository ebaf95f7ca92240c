"""Timing on a GPU with events and CUDA graphs, and on a CPU with a clock; medians everywhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

Work = Callable[[], object]
#: Calls in a CUDA graph, at least: launching it takes the host some 10 us, in which the GPU waits.
_CALLS = 20


def median_seconds(work: Work, device: torch.device, *, repeats: int = 30, warmup: int = 5) -> float:
    """Return the median time of one call of `work`."""
    if device.type != "cuda":
        warmup, repeats = 1, min(repeats, 5)
    for _ in range(warmup):
        work()
    return statistics.median(seconds(work, device) for _ in range(repeats))


def median_replay_seconds(works: Sequence[Work], device: torch.device) -> float:
    """Return the median time of one of `works`, run one after the other; on a GPU several times, in one CUDA graph.

    Give works over different buffers, so that none finds its data in the cache.
    """
    n_rounds = -(-_CALLS // len(works)) if device.type == "cuda" else 1

    def every() -> None:
        for _ in range(n_rounds):
            for work in works:
                work()

    if device.type != "cuda":
        return median_seconds(every, device) / len(works)
    every()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return median_seconds(graph.replay, device) / (n_rounds * len(works))


def seconds(work: Work, device: torch.device) -> float:
    """Return the time of one call of `work`; the device is idle before and after it."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


@lru_cache(maxsize=4)
def copy_bytes_per_second(device: torch.device) -> float:
    """Return what a large copy moves, bytes read plus bytes written."""
    n = 1 << (31 if device.type == "cuda" else 28)
    source = torch.randint(0, 256, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / median_seconds(lambda: target.copy_(source), device)


@lru_cache(maxsize=4)
def matrix_flops_per_second(device: torch.device) -> float:
    """Return the rate of a large matrix product: bfloat16 on a GPU, float32 on a CPU, random numbers."""
    gpu = device.type == "cuda"
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device, repeats=10)


def cold_copies(n_bytes: int, device: torch.device) -> int:
    """Return how many buffers of n_bytes to go through so that each is out of the cache when its turn comes."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if n_bytes > 4 * cache else 2 + 2 * cache // max(1, n_bytes)
