"""Work as tasks of Ray, on one machine or on many: its scheduler, its retries, nothing of ours."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any

import torch

from kvcompress.calibration.attempts import Attempts
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import note_again, note_repeated, pieces_of, shared_pieces
from kvcompress.calibration.ray_cluster import connected, on_gpu
from kvcompress.calibration.worker import Job, Sums, streamed_moments
from kvcompress.errors import CalibrationError, KVCompressError, OptionError

_MOST_RETRIES = 5
#: Windows of a task at most: what is lost with a worker, and how often sums travel.
_MOST_WINDOWS = 16


class RayWorkers:
    """Tasks of a Ray cluster.

    address: "auto" for the cluster at hand, "local" for one that is started on this machine, or HOST:PORT. A task has a
    GPU, or a share of one that `per_gpu` of them have, where `device` is cuda, one CPU otherwise; the checkpoint must
    lie at the same path on every node. Raises OptionError for a share of no GPU.
    """

    is_remote, is_spread, leads = True, False, True

    def __init__(self, address: str, device: str = "cpu", per_gpu: int = 1) -> None:
        self.address, self._per_gpu = address, per_gpu if device.startswith("cuda") else 0
        if per_gpu > 1 and not self._per_gpu:
            raise OptionError(f"--per-gpu shares GPUs, and the work is done on {device}. Leave it out.")
        self._counter: Any = None  # an actor of Attempts, which is a process: one serves all calls
        self._n_calls = 0

    @property
    def n(self) -> int:
        """How many tasks the cluster runs at a time."""
        resource = "GPU" if self._per_gpu else "CPU"
        found = int(connected(self.address).cluster_resources().get(resource, 0))
        if not found:
            raise OptionError(f"the Ray cluster at {self.address} has no {resource}.")
        return found * (self._per_gpu or 1)

    def hold(self, n_bytes: int) -> bool:
        """Return True: what a node's devices hold is not known here. Streaming is asked for with a memory."""
        return True

    def prepare(self, checkpoint: str, dtype: str) -> None:
        """Nothing: a task loads what it needs, and its worker keeps that for the next one."""

    def sums(self, job: Job, windows: list[int], told: Callable[[float], None]) -> Iterator[Moments]:
        """Yield the sums of windows, a task's at a time. Raises CalibrationError where Ray gives one up."""
        streams = job.memory is not None
        pieces = shared_pieces(job, windows, self.n) if streams else pieces_of(windows, self.n, _MOST_WINDOWS)
        for index, found in self.each(_sum, [(job, piece) for piece in pieces], of=pieces):
            told(len(pieces[index]))
            yield Moments.of_arrays(*found)

    def each(
        self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]], *, of: Sequence[list[int]] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, function(*item, device)) of every item, in any order. Raises CalibrationError as `sums`.

        of: the windows of each item, of which it is told where they are repeated.
        """
        ray = connected(self.address)
        attempts, call = self._attempts(), self._n_calls
        self._n_calls += 1
        needs = on_gpu(self._per_gpu) if self._per_gpu else {"num_cpus": 1}
        task = ray.remote(max_retries=_MOST_RETRIES, **needs)(_run)
        sent = enumerate(_sent_once(ray, items))
        running = {task.remote(function, self._per_gpu, attempts, (call, i), *item): i for i, item in sent}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                ours = isinstance(error.cause, (KVCompressError, torch.OutOfMemoryError))  # its own words, not Ray's
                raise error.cause if ours else error from None
            except ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CalibrationError(
                    f"Ray gave up a task after {_MOST_RETRIES} retries ({reason}). "
                    "Look at its log, or run without --ray."
                ) from error
            if ray.get(attempts.of.remote((call, index))) > 1:
                why = "a worker died and Ray started another one"
                note_repeated(of[index], why) if of else note_again(index, len(items), why)
            yield index, found

    def _attempts(self) -> Any:
        if self._counter is None:
            lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
            self._counter = connected(self.address).remote(**lasting)(Attempts).remote()
        return self._counter

    def close(self) -> None:
        """Let the counting actor go; the cluster is not ours."""
        self._counter = None


def _sent_once(ray: Any, items: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return items with what several of them share, such as a job, in Ray's store, of which a node has one copy."""
    things = [x for item in items for x in item if not isinstance(x, (str, int, float, NoneType))]
    times, stored = Counter(map(id, things)), dict[int, Any]()
    for x in things:
        if times[id(x)] > 1 and id(x) not in stored:
            stored[id(x)] = ray.put(x)
    return [tuple(stored.get(id(x), x) for x in item) for item in items]


def _run(function: Callable[..., Any], per_gpu: int, attempts: Any, index: tuple[int, int], *args: Any) -> Any:
    """Call a function with the device that Ray gave this task."""
    import ray

    ray.get(attempts.begin.remote(index))
    if not per_gpu:
        return function(*args, "cpu")
    # a task that asks for a GPU is left one processor by Ray
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (per_gpu * max(1, torch.cuda.device_count()))))
    given, visible = ray.get_gpu_ids()[0], os.environ.get("CUDA_VISIBLE_DEVICES")
    place = visible.split(",").index(str(given)) if visible else int(given)
    torch.cuda.set_device(place)  # else what names none, such as pinned memory, takes some of the first one
    return function(*args, f"cuda:{place}")


def _sum(job: Job, windows: list[int], device: str) -> Any:
    """Return the sums of windows, as arrays, which Ray hands on without a copy."""
    if job.memory is not None:
        return streamed_moments(job, windows, device).arrays()
    sums = Sums(job, device, saves=False)
    sums.add(windows)
    held = sums.taken()
    assert held is not None
    return held.arrays()
