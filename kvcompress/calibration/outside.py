"""What a process takes of a GPU beside what torch allocates there: CUDA itself, and its libraries' handles and kernels.

A handle is a thread's own for as long as the thread lives, and another's afterwards. On an H100 CUDA takes 0.65 GB, a
thread that multiplies 0.07 GB, the first that solves 0.17 GB, each further one 0.1 GB, and generators take 0.1 GB.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch

from kvcompress.calibration.memory import counted_outside
from kvcompress.side_by_side import FEEDING

#: Kernels that are loaded later than at the first look.
_LATER = 64_000_000
#: Where more than this is found beyond what is counted, others use the GPU, too, and what is counted holds.
_OTHERS = 500_000_000


def outside_bytes(place: int, *, solves: bool) -> int:
    """Return the bytes that this process takes of a GPU beside the allocator, with all that it is going to use begun.

    place: the GPU's index; solves: whether sites are fitted there. Counted where others use the GPU, too.
    """
    _begin(f"cuda:{place}")
    if solves:
        _begin_feeding(f"cuda:{place}")
    free, total = torch.cuda.mem_get_info(place)
    found = total - free - torch.cuda.memory_reserved(place) + _LATER
    counted = counted_outside(solves=solves)
    return found if found <= counted + _OTHERS else counted


@cache
def _begin(device: str) -> None:
    """Have this thread, and the one that goes back, take what a pass there and back takes."""
    with torch.enable_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x = torch.eye(16, dtype=dtype, device=device, requires_grad=True)
            (x @ x).sum().backward()
    with torch.no_grad():
        root, _ = torch.linalg.cholesky_ex(x)
        torch.linalg.solve_triangular(root, x, upper=False)
        torch.empty(1, device=device).exponential_(generator=torch.Generator(device))
    torch.cuda.synchronize(device)


@cache
def _begin_feeding(device: str) -> None:
    """Have as many threads as fit sites at a time take what they need; others take it over from them."""
    together = Barrier(FEEDING)

    def use() -> None:
        x = torch.eye(16, dtype=torch.float64, device=device)
        torch.linalg.solve(x, torch.linalg.eigh(x @ x)[1])
        together.wait(60)  # the handles of one that has ended would be the next one's

    with ThreadPoolExecutor(FEEDING) as pool:
        for begun in [pool.submit(use) for _ in range(FEEDING)]:
            begun.result()
    torch.cuda.synchronize(device)
