"""Workers that are none: this process does what they would, the last of it first, as a reference of what is shared."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvcompress.calibration import processes
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import pieces_of
from kvcompress.calibration.worker import Job, Sums


class Backwards:
    n, is_remote, is_spread = 3, True, False

    def __init__(self) -> None:
        self.summed: list[int] = []
        self.called: list[str] = []

    def hold(self, n_bytes: int) -> bool:
        return True

    def prepare(self, checkpoint: str, dtype: str) -> None:
        pass

    def sums(self, job: Job, windows: list[int], told: Callable[[float], None]) -> Iterator[Moments]:
        self.summed += windows
        for piece in reversed(pieces_of(windows, self.n, 4)):
            sums = Sums(job, "cpu", saves=False)
            sums.add(piece)
            told(len(piece))
            found = sums.taken()
            assert found is not None
            yield found

    def each(self, function: Any, items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for index in reversed(range(len(items))):
            self.called.append(function.__name__)
            yield index, function(*items[index], "cpu")

    def close(self) -> None:
        pass


def awake(_device: str) -> None:
    """Take the time of a short task, in a process that has imported what the tasks of these tests need."""
    time.sleep(1)


def leave_workers() -> None:
    """Let two processes end while workers of theirs are there, as what uses them may. Exits with 0 if they do."""
    for name in ("_begin", "_take", "_wake"):
        setattr(processes, name, str)  # the imports take seconds
    fork = multiprocessing.get_context("fork")  # of this process, which has them
    begun = [fork.Process(target=_leave, args=(closes,)) for closes in (False, True)]
    for process in begun:
        process.start()
    for process in begun:
        process.join(30)
    ended = [process.exitcode == 0 for process in begun]
    for process in begun:
        process.kill()
    sys.exit(0 if all(ended) else f"closed: {ended[1]}, not closed: {ended[0]}")


def _leave(closes: bool) -> None:
    workers = processes.LocalWorkers(("cpu",))
    assert list(workers.each(str, [()])) == [(0, "cpu")]
    if closes:
        workers.close()
    else:
        globals()["kept"] = workers
