"""Calibration shared out: pieces of the windows, each summed by a worker with a model of its own, joined in order.

Windows are independent and the sums are float64, so that any number of workers gives the moments of one process, to
rounding. Labels are seeded by window, samples are taken by window: a piece does not depend on who sums it, or when.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kvcompress.calibration.fisher import Progress, collect_moments
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import Note

#: Windows of a piece at most: what is lost with a worker, and how often sums travel.
_MOST_WINDOWS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a worker needs to sum a piece; it travels, so paths must be those of every worker.

    windows: [n_windows, seq_len] token ids. group, band: the blocks of the moments.
    """

    checkpoint: str
    dtype: str
    windows: Tensor
    sinks: int
    recent: int
    seed: int
    group: int
    band: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Windows start to stop, the last one not included."""

    start: int
    stop: int


class Workers(Protocol):
    """Who sums pieces: processes of this host (processes.py) or tasks of Ray (ray_tasks.py)."""

    n: int

    def sums(self, job: Job, pieces: list[Piece]) -> Iterator[tuple[Piece, Moments]]:
        """Yield every piece with its moments, on the CPU, in any order.

        A piece whose worker died is summed again, and a Note says so. Raises CalibrationError where a worker dies
        again and again.
        """


def pieces_of(n_windows: int, start: int, n_workers: int) -> list[Piece]:
    """Return the windows from `start` on, in pieces of which every worker has two at least, as far as they go."""
    size = max(1, min(_MOST_WINDOWS, (n_windows - start) // (2 * n_workers)))
    return [Piece(i, min(i + size, n_windows)) for i in range(start, n_windows, size)]


def sum_piece(job: Job, piece: Piece, device: str) -> Moments:
    """Return the moments of a piece, on the CPU; the model stays loaded in this process for the next one."""
    model, spec = _loaded(job.checkpoint, job.dtype, device)
    moments = empty_moments(spec, {}, group=job.group, band=job.band, device=device)
    moments.n_windows = piece.start
    collect_moments(
        model, spec, job.windows, moments, sinks=job.sinks, recent=job.recent, seed=job.seed, stop=piece.stop
    )
    moments.sites = {site: sums.to("cpu") for site, sums in moments.sites.items()}
    return moments


@lru_cache(maxsize=1)
def _loaded(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    with open_checkpoint(path) as checkpoint:
        return load_weights(checkpoint.path, dtype=dtype, device=device), checkpoint.spec


def collect_shared(
    job: Job,
    moments: Moments,
    workers: Workers,
    *,
    partial_file: Path | None = None,
    progress: Progress | None = None,
) -> Moments:
    """Add every window from `moments.n_windows` on, summed by workers, to `moments` (on the CPU) and return it.

    Pieces are joined in their order, whoever is done first. With `partial_file` the sums are saved whenever some were
    joined, from where any number of workers, or one process, goes on.
    """
    n_windows, seq_len = job.windows.shape
    pieces = pieces_of(n_windows, moments.n_windows, workers.n)
    waiting: dict[int, tuple[Piece, Moments]] = {}
    done = moments.n_windows
    for piece, found in workers.sums(job, pieces):
        waiting[piece.start] = piece, found
        done += piece.stop - piece.start
        if progress:
            progress(done * seq_len, n_windows * seq_len)
        if not _join(moments, waiting):
            continue
        if partial_file and moments.n_windows < n_windows:
            moments.save(partial_file)
    return moments


def _join(moments: Moments, waiting: dict[int, tuple[Piece, Moments]]) -> bool:
    """Join what continues the sums, and return whether anything did."""
    before = moments.n_windows
    while moments.n_windows in waiting:
        piece, found = waiting.pop(moments.n_windows)
        for site, sums in found.sites.items():
            moments.sites[site].join(sums)
        moments.rotations, moments.signature = found.rotations, found.signature
        moments.n_windows = piece.stop
    return moments.n_windows > before


def note_repeated(pieces: Iterable[Piece], why: str) -> None:
    """Say which windows are summed again."""
    told = ", ".join(f"{p.start} to {p.stop - 1}" for p in sorted(pieces, key=lambda p: p.start))
    if told:
        warnings.warn(f"{why}: windows {told} are summed again.", Note, stacklevel=2)
