"""Windows of a calibration on the devices of this host: a process each, with a model of its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.util import Finalize, is_exiting
from typing import Any

from kvcompress.calibration.memory import USABLE_SHARE
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import note_again, note_repeated, shared_pieces
from kvcompress.calibration.worker import Job, add_windows, begin_sums, load, save_sums
from kvcompress.errors import CalibrationError, Note, OptionError

#: How often workers may die before that is no accident.
_MOST_DEATHS = 5
#: Windows that a worker is given ahead, so that it never waits for the next one.
_AHEAD = 2
#: How often it is looked how far streamed passes are.
_LOOK_SECONDS = 1.0
#: Where processes are ended in what multiprocessing does at the end of one that it began: it closes the queues by which
#: pools tell them to (10), and then joins them for as long as it takes.
_BEFORE_QUEUES = 11


class LocalWorkers:
    """A process for each device: ("cuda:0", "cuda:1"), or ("cpu", "cpu") for two processes on the CPU.

    They begin at once, so that they import what they need while this process does the same.
    """

    is_remote, leads = False, True

    def __init__(self, devices: Sequence[str]) -> None:
        if not devices:
            raise OptionError("no device was named for the workers of the calibration.")
        self.devices = tuple(devices)
        self._crew: list[_Worker] = []
        Finalize(self, _end, args=(self._crew,), exitpriority=_BEFORE_QUEUES)
        for worker in self._workers():
            worker.submit(_wake, worker.device)

    @property
    def n(self) -> int:
        return len(self.devices)

    @property
    def is_spread(self) -> bool:
        return any("+" in devices for devices in self.devices)

    def hold(self, n_bytes: int) -> bool:
        """Return whether a worker can hold so many bytes; where its share of a GPU cannot, each gets whole ones."""
        if not self.devices[0].startswith("cuda"):
            return True
        import torch

        gpus = list(dict.fromkeys(gpu for devices in self.devices for gpu in devices.split("+")))
        each = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus) * USABLE_SHARE
        if not self.is_spread and n_bytes * self.devices.count(gpus[0]) <= each:
            return True
        n = max(1, math.ceil(n_bytes / each))
        if n > len(gpus):
            return False
        spread = tuple("+".join(gpus[i : i + n]) for i in range(0, len(gpus) - n + 1, n))
        if spread != self.devices:
            if len(gpus) < len(self.devices):
                warnings.warn(
                    "models of several processes do not fit on a GPU: one process has it.", Note, stacklevel=2
                )
            self.close()
            self.devices = spread
        return True

    def prepare(self, checkpoint: str, dtype: str) -> None:
        for worker in self._workers():
            worker.submit(load, checkpoint, dtype, worker.device)

    def sums(self, job: Job, windows: list[int], told: Callable[[float], None]) -> Iterator[Moments]:
        """Sum windows; every worker saves its part. Yields nothing. Raises CalibrationError where they keep dying."""
        waiting, running = deque(shared_pieces(job, windows, self.n)), dict[Future[bool], tuple[_Worker, list[int]]]()
        ahead = _AHEAD if job.memory is None else 1
        crew, deaths, reached = self._workers(), 0, _Reached(job, told)
        look = None if job.memory is None else _LOOK_SECONDS
        for worker in crew:
            worker.begin(job)
        while True:
            for worker in crew:
                self._supply(worker, waiting, running, ahead)
            reached.tell([windows for _, windows in running.values()])
            if not running:
                return
            for future in wait(running, look, return_when=FIRST_COMPLETED).done:
                if future not in running:  # of a worker whose death was met already
                    continue
                worker, added = running.pop(future)
                try:
                    saved = future.result()
                except BrokenProcessPool as error:
                    deaths += 1
                    lost = self._lost(worker, added, running, reached)
                    if deaths >= _MOST_DEATHS:
                        raise _too_many_deaths(deaths, lost) from error
                    note_repeated(lost, "a worker of the calibration died")
                    waiting.extendleft(reversed(shared_pieces(job, lost, 1)))
                    worker.begin(job)
                else:
                    worker.unsaved = [] if saved else [*worker.unsaved, *added]
                    reached.whole += len(added)
        yield from ()

    def each(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, function(*item, device)) of every item, in any order. Raises CalibrationError as `sums`."""
        waiting, running = deque(range(len(items))), dict[Future[Any], tuple[_Worker, int]]()
        crew, deaths = self._workers(), 0
        while waiting or running:
            busy = [worker for worker, _ in running.values()]
            for worker in crew:
                if waiting and worker not in busy:
                    index = waiting.popleft()
                    running[worker.submit(function, *items[index], worker.device)] = worker, index
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, index = running.pop(future)
                try:
                    yield index, future.result()
                except BrokenProcessPool as error:
                    deaths += 1
                    if deaths >= _MOST_DEATHS:
                        raise _too_many_deaths(deaths, []) from error
                    note_again(index, len(items), "a worker died")
                    waiting.appendleft(index)
                    worker.restart()

    def close(self) -> None:
        _end(self._crew)

    def _workers(self) -> list[_Worker]:
        if not self._crew:
            self._crew += [_Worker(device, self.n) for device in self.devices]
        return self._crew

    @staticmethod
    def _supply(
        worker: _Worker,
        waiting: deque[list[int]],
        running: dict[Future[bool], tuple[_Worker, list[int]]],
        ahead: int,
    ) -> None:
        """Give a worker windows, and where none is left let it save its part."""
        n_running = sum(w is worker for w, _ in running.values())
        while waiting and n_running < ahead:
            windows = waiting.popleft()
            running[worker.submit(add_windows, windows, worker.device)] = worker, windows
            n_running += 1
        if not n_running and worker.unsaved:
            running[worker.submit(save_sums, worker.device)] = worker, []

    @staticmethod
    def _lost(
        worker: _Worker,
        added: list[int],
        running: dict[Future[bool], tuple[_Worker, list[int]]],
        reached: _Reached,
    ) -> list[int]:
        """Return the windows that a dead worker had not saved, and take them back."""
        lost = [*worker.unsaved, *added]
        reached.whole -= len(worker.unsaved)
        for future, (owner, windows) in list(running.items()):
            if owner is worker:
                del running[future]
                lost += windows
        worker.restart()
        return sorted(lost)


class _Reached:
    """Tells how many windows are summed; of those whose layers are streamed as much as is done."""

    def __init__(self, job: Job, told: Callable[[float], None]) -> None:
        self._job, self._told, self._before, self.whole = job, told, 0.0, 0

    def tell(self, running: Sequence[list[int]]) -> None:
        """running: the windows that workers have in hand."""
        streamed = [windows for windows in running if windows and self._job.memory is not None]
        now = self.whole + sum(len(windows) * self._job.parts.share_streamed(windows) for windows in streamed)
        if streamed:  # what is done of those is never lost, but gone for a moment when it is saved
            now = max(now, self._before)
        self._told(now - self._before)
        self._before = now


class _Worker:
    """A process on a device, and the windows that it has summed and not saved."""

    def __init__(self, device: str, n: int) -> None:
        self.device, self._n = device, n
        self.restart()

    def restart(self) -> None:
        context = multiprocessing.get_context("spawn")  # a process that is forked cannot use a GPU
        self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(self._n,))
        self.unsaved: list[int] = []
        self.submit(_take, self.device)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Return the future of a call, which also tells of a process that died with nothing to do."""
        try:
            return self._pool.submit(function, *args)
        except BrokenProcessPool as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def begin(self, job: Job) -> None:
        self.unsaved = []
        self.submit(begin_sums, job, self.device)

    def end(self) -> threading.Thread:
        """Return what waits until the process has ended."""
        ending = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True})
        ending.start()
        return ending


def _end(crew: list[_Worker]) -> None:
    """Let the processes of a crew end, beside what this one does next; it does not end before they do."""
    endings = [worker.end() for worker in crew]
    crew.clear()
    for ending in endings:
        if is_exiting():
            ending.join()
        else:
            Finalize(None, ending.join, exitpriority=_BEFORE_QUEUES)


def _too_many_deaths(deaths: int, lost: list[int]) -> CalibrationError:
    which = f", last with windows {lost[0]} on" if lost else ""
    return CalibrationError(
        f"a worker of the calibration died {deaths} times{which}. "
        "It may have run out of memory: give fewer devices, or a smaller --seq-len."
    )


def workers_on_gpus(asked: str, per_gpu: int = 1) -> LocalWorkers:
    """Return `per_gpu` workers for each GPU that is asked for: all, so many (2), or these (0,3). Raises OptionError."""
    import torch

    here = torch.cuda.device_count()
    if not here:
        raise OptionError("--gpus needs a GPU, and there is none here. Leave it out.")
    if asked == "all":
        chosen = list(range(here))
    elif asked.replace(",", "").isdecimal() and "," in asked:
        chosen = [int(part) for part in asked.split(",") if part]
    elif asked.isdecimal():
        chosen = list(range(int(asked)))
    else:
        raise OptionError(f"--gpus takes all, a number, or numbers with commas (0,3), found '{asked}'.")
    if not chosen or max(chosen) >= here or len(set(chosen)) < len(chosen):
        raise OptionError(f"--gpus {asked}: this machine has {here}, counted from 0.")
    return LocalWorkers([f"cuda:{i}" for i in chosen] * per_gpu)


def _begin(n_workers: int) -> None:
    """Take a share of the processors; this process ends with the one that began it, also where that is killed."""
    import torch

    own = (os.cpu_count() or 1) // n_workers
    torch.set_num_threads(max(1, min(torch.get_num_threads(), own)))  # which OMP_NUM_THREADS may bound
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _take(device: str) -> None:
    """Take a device: else what names none, such as pinned memory, takes some of the first GPU."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device.split("+")[0])


def _wake(device: str) -> None:
    """Take what a process needs once: its GPUs; this file brought what loads a model."""
    import torch

    for one in device.split("+"):
        torch.zeros(1, device=one)
