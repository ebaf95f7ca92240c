"""Processes that torchrun has begun: all run the same command; the first leads, the others do what it hands out.

They talk through torch.distributed on the CPU. Where one dies, torchrun ends them all; the parts that were saved stay,
and the same command with --resume goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from kvcompress.calibration.memory import USABLE_SHARE
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import shared_pieces
from kvcompress.calibration.worker import Job, add_windows, begin_sums, load, save_sums
from kvcompress.errors import KVCompressError

#: The leader fits and writes while the others wait for their next call.
_PATIENCE = timedelta(days=7)
Call = tuple[Callable[..., Any], tuple[Any, ...]]


class RankWorkers:
    """The ranks of torchrun, this one among them; each has the GPU of its number where `device` is cuda."""

    is_remote = is_spread = False

    def __init__(self, device: str) -> None:
        import torch
        from torch import distributed

        self._distributed = distributed
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        self._rank, self._n = distributed.get_rank(), distributed.get_world_size()
        self.device = "cpu"
        if device.startswith("cuda"):
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)

    @property
    def n(self) -> int:
        return self._n

    @property
    def leads(self) -> bool:
        """Whether this is the process that hands out the work; the others `serve`."""
        return self._rank == 0

    def hold(self, n_bytes: int) -> bool:
        """Return whether each rank's device can hold so many bytes."""
        if not self.device.startswith("cuda"):
            return True
        import torch

        return n_bytes <= torch.cuda.get_device_properties(self.device).total_memory * USABLE_SHARE

    def serve(self) -> None:
        """Do what the leader hands out, until it has no more."""
        while self._done_together(None) is not None:
            pass

    def prepare(self, checkpoint: str, dtype: str) -> None:
        self._done_together([(load, (checkpoint, dtype))] * self._n)

    def sums(self, job: Job, windows: list[int], told: Callable[[float], None]) -> Iterator[Moments]:
        """Sum windows; every rank saves its part. Yields nothing."""
        self._done_together([(begin_sums, (job,))] * self._n)
        pieces = shared_pieces(job, windows, self._n)
        for index, _ in self.each(add_windows, [(piece,) for piece in pieces]):
            told(len(pieces[index]))
        self._done_together([(save_sums, ())] * self._n)
        yield from ()

    def each(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, function(*item, device)) of every item, in their order."""
        for first in range(0, len(items), self._n):
            calls: list[Call] = [(function, item) for item in items[first : first + self._n]]
            results = self._done_together(calls)
            assert results is not None
            yield from enumerate(results[: len(calls)], first)

    def close(self) -> None:
        """Let the others end."""
        if self._distributed.is_initialized():
            if self.leads:
                self._distributed.broadcast_object_list([None], src=0)
            self._distributed.destroy_process_group()

    def _done_together(self, calls: list[Call] | None) -> list[Any] | None:
        """Do this rank's call of those that the leader hands out (None: of the leader's); return all ranks' results.

        The leader raises what any rank raised. None where there is nothing more to do, and for ranks that serve [].
        """
        handed: list[Any] = [calls]
        self._distributed.broadcast_object_list(handed, src=0)
        if handed[0] is None:
            self._distributed.destroy_process_group()
            return None
        result: Any = None
        if self._rank < len(handed[0]):
            result = self._result(*handed[0][self._rank])
        gathered: list[Any] | None = [None] * self._n if self.leads else None
        self._distributed.gather_object(result, gathered)
        for found in gathered or []:
            if isinstance(found, BaseException):
                raise found
        return gathered or []

    def _result(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return function(*args, self.device)
        except KVCompressError as error:
            return error
