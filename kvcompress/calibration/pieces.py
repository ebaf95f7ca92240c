"""Calibration shared out: windows summed by workers, each with a model of its own, and joined.

Windows are independent and the sums are float64, so that any number of workers gives the moments of one process, to
rounding. Labels are seeded by window, samples are taken by window: nothing depends on who sums a window, or when.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcompress.calibration.coherence import Watch
from kvcompress.calibration.fisher import Progress
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.parts import Seldom
from kvcompress.calibration.worker import Job, save_streamed, watch_windows
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.writer import check_space
from kvcompress.errors import Note
from kvcompress.model.model_spec import ModelSpec


class Workers(Protocol):
    """Who sums windows: processes of this host (processes.py) or tasks of Ray (ray_tasks.py)."""

    #: Whether they may be on other machines, with processors, so that fits are worth sending, and disks of their own.
    is_remote: bool

    @property
    def leads(self) -> bool:
        """Whether this process hands out the work; else it only serves (`RankWorkers.serve`)."""

    @property
    def is_spread(self) -> bool:
        """Whether a worker has several GPUs, because one cannot hold the model."""

    @property
    def n(self) -> int: ...

    def hold(self, n_bytes: int) -> bool:
        """Return whether a worker can hold so many bytes, on several devices if it must; they arrange themselves."""

    def prepare(self, checkpoint: str, dtype: str) -> None:
        """Let workers load their models while this process does something else; it does not wait."""

    def sums(self, job: Job, windows: list[int], told: Callable[[float], None]) -> Iterator[Moments]:
        """Sum windows; yield what is not saved as a part yet, on the CPU. told(n): n more windows are summed, whole
        ones or shares of them.

        What a worker that died had not handed in is summed again, and a Note says so. Raises CalibrationError where
        workers die again and again.
        """

    def each(self, function: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, function(*item, device)) of every item, in any order; of one whose worker died, again."""

    def close(self) -> None:
        """End the processes, if they are our own."""


def collect_streams(job: Job, device: str, *, progress: Progress | None = None) -> Moments:
    """Return the moments of all windows of a job, those of its parts included; this process streams the others."""
    n_windows, seq_len = job.windows.shape
    missing = job.parts.missing()
    held: list[Moments] = []
    for piece in shared_pieces(job, missing, 1) if missing else ():
        before = n_windows - len(missing)

        def told(tokens: int, _: int, before: int = before, n: int = len(piece)) -> None:
            if progress:
                progress(before * seq_len + tokens * n // n_windows, n_windows * seq_len)

        held = [save_streamed(job, piece, device, progress=told)]
        missing = job.parts.missing()
    return job.parts.joined(held)


def check_streams(job: Job, checkpoint: Checkpoint) -> None:
    """Raise OutputError where the disk has no room for every layer's inputs."""
    spec = checkpoint.spec
    numbers = job.windows.numel() * spec.hidden_size * (len(spec.layers) + len(spec.own_layers) + 3)
    check_space(
        job.parts.directory / "stream",
        numbers * getattr(torch, job.dtype).itemsize,
        "Free some space, or lower --tokens.",
    )


def collect_shared(job: Job, workers: Workers, *, progress: Progress | None = None) -> Moments:
    """Return the moments of all windows of a job, those of its parts included, on the CPU; workers sum the others."""
    n_windows, seq_len = job.windows.shape
    missing = job.parts.missing()
    done = float(n_windows - len(missing))

    def told(more: float) -> None:
        nonlocal done
        done += more
        if progress and more:
            progress(round(done * seq_len), n_windows * seq_len)

    held: list[Moments] = []
    save = Seldom(job.parts.save)
    for found in workers.sums(job, missing, told) if missing else ():
        if held:
            held[0].join(found)
        else:
            held.append(found)
        save(held[0])
    return job.parts.joined(held)


def collect_watched(
    job: Job,
    workers: Workers,
    _spec: ModelSpec,
    windows: Tensor,
    watched: Moments,
    *,
    seed: int,
    progress: Progress | None = None,
    **_: Any,
) -> Moments:
    """Add windows to watches (coherence.py), summed by workers; a collect_moments that is shared out."""
    job = replace(job, windows=windows, seed=seed)
    watches = {site: watch for site, watch in watched.sites.items() if isinstance(watch, Watch)}
    arrays = {site: watch.arrays() for site, watch in watches.items()}
    size, done = -(-len(windows) // workers.n), 0
    pieces = [list(range(i, min(i + size, len(windows)))) for i in range(0, len(windows), size)]
    for index, found in workers.each(watch_windows, [(job, arrays, piece) for piece in pieces]):
        for site, watch in watches.items():
            watch.add_ratios(torch.tensor(found[site]), len(pieces[index]))
        done += len(pieces[index])
        if progress:
            progress(done * windows.shape[1], windows.numel())
    return watched


def shared_pieces(job: Job, windows: Sequence[int], n_workers: int) -> list[list[int]]:
    """Return what workers of one disk are given at a time: a window; or, where layers are streamed, equal shares.

    Streamed passes that were begun come first, with their own windows.
    """
    if job.memory is None:
        return [[w] for w in windows]
    begun_before = job.parts.streams(windows)
    left = sorted(set(windows) - {w for piece in begun_before for w in piece})
    size = max(1, -(-len(left) // n_workers))
    return begun_before + [left[i : i + size] for i in range(0, len(left), size)]


def pieces_of(windows: Sequence[int], n_workers: int, most: int) -> list[list[int]]:
    """Return windows in pieces of at most `most`, of which every worker has two at least, as far as they go."""
    size = max(1, min(most, len(windows) // (2 * n_workers)))
    return [list(windows[i : i + size]) for i in range(0, len(windows), size)]


def note_repeated(windows: Iterable[int], why: str) -> None:
    """Say which windows are summed again."""
    if told := ", ".join(ranges(windows)):
        warnings.warn(f"{why}: windows {told} are summed again.", Note, stacklevel=2)


def note_again(index: int, n_tasks: int, why: str) -> None:
    """Say which of the tasks of a call is done again."""
    warnings.warn(f"{why}: task {index + 1} of {n_tasks} is done again.", Note, stacklevel=2)


def ranges(windows: Iterable[int]) -> list[str]:
    """Return numbers as ranges in words: 0 to 4, 7."""
    runs = [[w for _, w in run] for _, run in groupby(enumerate(sorted(windows)), lambda pair: pair[1] - pair[0])]
    return [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
