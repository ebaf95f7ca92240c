"""Sites fitted side by side: each is a chain of small matrices, which one processor works through as fast as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Memory that fits at work may take together, and how many float64 matrices of a site's blocks one of them holds.
_MEMORY, _MATRICES = 8 << 30, 16
_MOST = 16
#: Threads that start a GPU's kernels hold each other up, as Python runs one at a time, and each takes memory there.
FEEDING = 2


def side_by_side(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    width: int,
    device: str = "cpu",
    done: Callable[[int], None] | None = None,
) -> list[Result]:
    """Return function(item) of every item, in order, in as many threads as torch may use, each with one processor.

    width: numbers of the widest site, which bounds how many fit in memory. device: where nearly all of it is computed.
    done: told how many are finished.
    """
    if device != "cpu":
        _begin_solving(device)
    most = _MOST if device == "cpu" else FEEDING
    n = min(most, len(items), torch.get_num_threads(), max(1, _MEMORY // (_MATRICES * 8 * width**2)))
    results = []
    with _one_processor(n > 1), ThreadPoolExecutor(max(1, n)) as pool:
        for result in pool.map(function, items) if n > 1 else map(function, items):
            results.append(result)
            if done:
                done(len(results))
    return results


def solved(matrices: Tensor, wanted: Tensor) -> Tensor:
    """Return X of matrices X = wanted, [n, width, n_columns]; matrices: [n, width, width].

    On a CPU one by one: of more than 128 numbers, several threads hang in a batch (pytorch/pytorch#142815).
    """
    if matrices.is_cuda:
        return torch.linalg.solve(matrices, wanted)
    return torch.stack([torch.linalg.solve(*one) for one in zip(matrices, wanted, strict=True)])


def fitting_device(device: str, width: int, room: int | None = None) -> str:
    """Return where sites of `width` numbers are fitted: a GPU that is meant by `device`, "auto" included, if it has
    four times what threads of `side_by_side` take there, else the CPU. room: bytes that this process may take there;
    None: what is free.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda") or not torch.cuda.is_available():  # tasks of a cluster may have what is not here
        return "cpu"
    if room is None:
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    most = min(_MEMORY, 4 * FEEDING * _MATRICES * 8 * width**2)
    return device if room - torch.cuda.memory_allocated(device) > most else "cpu"


@cache
def _begin_solving(device: str) -> None:
    """Have torch load what it solves with on a GPU, at its first use: two threads that do so at once break it.

    A thread that ends does so, whose handle is then one of theirs.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.linalg.inv(torch.ones(1, 1, device=device))).result()


@contextmanager
def _one_processor(wanted: bool) -> Iterator[None]:
    """Within the block torch uses one processor in this thread and in those that begin; as before afterwards."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
