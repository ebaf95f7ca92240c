"""What one worker of a calibration does, and what its process keeps for the next call: its model, and its sums."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.coherence import Watch
from kvcompress.calibration.fisher import Progress, Summing, begun, check_moments
from kvcompress.calibration.memory import limited
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.parts import Parts, Seldom
from kvcompress.calibration.streamed import collect_streamed
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.resident import StreamedModel
from kvcompress.model.model_spec import Site


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a worker needs to sum windows; it travels, so paths must be those of every worker.

    windows: [n_windows, seq_len] token ids. group, band: the blocks of the moments. parts: where the parts are, for
    workers that share a disk.
    """

    checkpoint: str
    dtype: str
    windows: Tensor
    sinks: int
    recent: int
    seed: int
    group: int
    band: int
    parts: Parts
    memory: int | None = None


class Sums:
    """What one worker has summed of a job; its model stays loaded in this process for the next job.

    saves: whether it saves its part now and then.
    """

    def __init__(self, job: Job, device: str, *, saves: bool = True) -> None:
        self._job, self._device = job, device
        self._save = Seldom(self._checked) if saves else None
        self._held: Moments | None = None

    def add(self, windows: Iterable[int]) -> bool:
        """Add windows and return whether all that was added is saved."""
        job = self._job
        if job.memory is not None:
            save_streamed(job, list(windows), self._device)
            return True
        summing = ready(job.checkpoint, job.dtype, self._device, job.recent)
        if self._held is None:
            first = self._device.split("+")[0]  # sums come to the device of their layer
            self._held = empty_moments(summing.spec, {}, group=job.group, band=job.band, device=first)
        for index in windows:
            summing.add(job.windows, index, self._held, sinks=job.sinks, seed=job.seed)
        return self._save is not None and self._save(self._held)

    def taken(self) -> Moments | None:
        """Return what was added, on the CPU, and forget it."""
        held, self._held = self._held, None
        if held is not None:
            check_moments(held)
            held.sites = {site: sums.to("cpu") for site, sums in held.sites.items()}
        return held

    def save(self) -> bool:
        """Save what was added as a part, and forget it."""
        if (held := self.taken()) is not None:
            self._job.parts.save(held)
        return True

    def _checked(self, held: Moments) -> None:
        check_moments(held)
        self._job.parts.save(held)


class _AtHand:
    """What this process, a worker, sums."""

    sums: Sums | None = None


def begin_sums(job: Job, device: str) -> None:
    """Let this process, a worker, sum windows of a job."""
    _AtHand.sums = Sums(job, device)


def add_windows(windows: list[int], _device: str) -> bool:
    """As Sums.add, of the job that was begun."""
    assert _AtHand.sums is not None
    return _AtHand.sums.add(windows)


def save_sums(_device: str) -> bool:
    """As Sums.save, of the job that was begun."""
    assert _AtHand.sums is not None
    return _AtHand.sums.save()


def save_streamed(job: Job, windows: list[int], device: str, *, progress: Progress | None = None) -> Moments:
    """Return the moments of windows, saved as a part; layers are streamed, which goes on where it was killed."""
    moments = streamed_moments(job, windows, device, progress=progress)
    job.parts.save(moments)
    shutil.rmtree(job.parts.stream(windows), ignore_errors=True)
    return moments


def streamed_moments(job: Job, windows: list[int], device: str, *, progress: Progress | None = None) -> Moments:
    """Return the moments of windows on the CPU, layers streamed."""
    model = streamed_model(job.checkpoint, job.dtype, device)
    moments = empty_moments(model.checkpoint.spec, {}, group=job.group, band=job.band)
    seen: dict[str, Any] = {"sinks": job.sinks, "recent": job.recent, "seed": job.seed}
    where = job.parts.stream(windows) if job.parts.directory.is_dir() else None  # else on a host of its own
    with limited(device, job.memory):
        return collect_streamed(
            model,
            model.checkpoint.spec,
            job.windows,
            moments,
            **seen,
            which=windows,
            directory=where,
            progress=progress,
        )


@lru_cache(maxsize=1)
def streamed_model(path: str, dtype: str, device: str) -> StreamedModel:
    """Return a model whose layers are streamed, for as long as this process lives."""
    with open_checkpoint(path) as checkpoint:
        return StreamedModel(checkpoint, dtype=getattr(torch, dtype), device=torch.device(device))


@lru_cache(maxsize=1)
def ready(path: str, dtype: str, device: str, recent: int) -> Summing:
    """Return the model of a checkpoint on a device, ready to be calibrated for as long as this process lives."""
    model, spec = _loaded(path, dtype, device)
    return begun(model, spec, recent)


@lru_cache(maxsize=1)
def _loaded(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    with open_checkpoint(path) as checkpoint:
        return load_weights(checkpoint.path, dtype=dtype, device=device), checkpoint.spec


def loaded_model(path: str, dtype: str, device: str) -> Any:
    """Return a worker's model, which stays."""
    return _loaded(path, dtype, device)[0]


def load(path: str, dtype: str, device: str) -> None:
    """Load a worker's model, which stays."""
    _loaded(path, dtype, device)


def watch_windows(job: Job, arrays: dict[Site, Any], windows: list[int], device: str) -> dict[Site, Any]:
    """Return what watches have of windows, as arrays."""
    first = device.split("+")[0]
    watches = {site: Watch([torch.tensor(a) for a in made_of], first) for site, made_of in arrays.items()}
    if job.memory is None:
        summing = ready(job.checkpoint, job.dtype, device, job.recent)
        for index in windows:
            summing.add(job.windows, index, Moments({**watches}), sinks=job.sinks, seed=job.seed)
    else:
        model, scratch = streamed_model(job.checkpoint, job.dtype, device), job.parts.directory
        seen: dict[str, Any] = {"sinks": job.sinks, "recent": job.recent, "seed": job.seed}
        with limited(device, job.memory):
            collect_streamed(
                model,
                model.checkpoint.spec,
                job.windows,
                Moments({**watches}),
                **seen,
                which=windows,
                scratch=scratch if scratch.is_dir() else None,
            )
    return {site: watch.ratios.cpu().numpy() for site, watch in watches.items()}
