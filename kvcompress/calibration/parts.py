"""What a calibration leaves that is killed: sums of some of the windows, in files of a directory, whoever made them.

A part is a moments file (moments.py) that says which windows it is of. No window is in two of them, so that any number
of workers goes on from them, or one process alone; and the whole is their sum.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.fisher import n_plain, n_samples_of
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.streamed import begun_windows, share_done
from kvcompress.checkpoint.writer import atomic_file, make_directory, remove_stale
from kvcompress.errors import CalibrationError
from kvcompress.model.model_spec import Site
from kvcompress.side_by_side import side_by_side

_PROTOCOL_FILE = "protocol.json"
#: Saving takes at most this share of the time.
_SAVING_SHARE = 0.05
#: Bytes that a second saves, until it is known: four GPUs, each with the sums of an 8B model.
_SAVED_BYTES = 4e8


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one calibration of `n_windows` windows. A window's first `sinks` tokens are in no sum."""

    directory: Path
    n_windows: int
    seq_len: int
    sinks: int

    @classmethod
    def opened(
        cls, directory: Path, protocol: dict[str, Any], shape: tuple[int, int], *, sinks: int, resume: bool
    ) -> Parts:
        """Return the parts in a directory, none where it is of another protocol, or where nothing is to be resumed."""
        file = directory / _PROTOCOL_FILE
        told = json.dumps(protocol, sort_keys=True)
        if not resume or not file.is_file() or file.read_text(encoding="utf-8") != told:
            shutil.rmtree(directory, ignore_errors=True)
        make_directory(directory)
        for left in directory.glob("*.safetensors"):
            remove_stale(left)
        if not file.is_file():
            with atomic_file(file) as scratch:
                scratch.write_text(told, encoding="utf-8")
        return cls(directory, *shape, sinks)

    def save(self, moments: Moments) -> None:
        """Write a part, in place of an earlier one that begins with the same window."""
        moments.save(self.directory / f"windows-{moments.order[0]:06d}.safetensors")

    def files(self) -> dict[Path, list[int]]:
        """Return each part's windows, in the order in which they were added. Raises CalibrationError."""
        found = {file: Moments.order_in(file) for file in sorted(self.directory.glob("windows-*.safetensors"))}
        seen = [w for order in found.values() for w in order]
        if len(set(seen)) < len(seen) or not all(0 <= w < self.n_windows for w in seen):
            raise CalibrationError(f"the parts in {self.directory} overlap. Remove it to calibrate again.")
        return found

    def missing(self) -> list[int]:
        """Return the windows that are in no part, rising."""
        done = {w for order in self.files().values() for w in order}
        return [w for w in range(self.n_windows) if w not in done]

    def first(self) -> Moments | None:
        """Return the part that begins with the first window and has no hole, where that is all there is, or None."""
        found = list(self.files().items())
        if len(found) == 1 and found[0][1] == list(range(len(found[0][1]))):
            return Moments.load(found[0][0])
        return None

    def joined(self, others: list[Moments]) -> Moments:
        """Return the sum of all parts and of `others`, which may be in a file, too; samples in the windows' order."""
        begin = {moments.order[0] for moments in others}
        files = [file for file, order in self.files().items() if order[0] not in begin]
        if not others:  # what is in memory can be added to
            others = [Moments.load(files.pop(0))]
        whole, *later = [*others, *(Moments.load(file, checked=False) for file in files)]
        order = [w for moments in (whole, *later) for w in moments.order]

        def join(site: Site) -> None:
            sums = whole.sites[site]
            sums.join(*(moments.sites[site] for moments in later))
            sums.samples = self._in_order(sums.samples, order, n_plain)
            sums.weighed_samples = self._in_order(sums.weighed_samples, order)

        side_by_side(join, list(whole.sites), width=max(sums.total.numel() for sums in whole.sites.values()))
        whole.order = sorted(order)
        return whole

    def stream(self, windows: Sequence[int]) -> Path:
        """Return the directory of a streamed pass over windows (streamed.py)."""
        return self.directory / f"stream-{windows[0]:06d}"

    def share_streamed(self, windows: Sequence[int]) -> float:
        """Return how much of the streamed pass over windows is done, whoever runs it."""
        return share_done(self.stream(windows))

    def streams(self, missing: Sequence[int]) -> list[list[int]]:
        """Return the windows of streamed passes that were begun and are still missing; others are removed."""
        found = []
        for directory in sorted(self.directory.glob("stream-*")):
            windows = begun_windows(directory)
            if windows and set(windows) <= set(missing):
                found.append(windows)
            else:
                shutil.rmtree(directory, ignore_errors=True)
        return found

    @contextmanager
    def kept_if_begun(self) -> Iterator[None]:
        """A block that leaves no directory behind where it fails before anything is in a part."""
        try:
            yield
        except BaseException:
            if not any(self.directory.glob("windows-*")) and not any(self.directory.glob("stream-*")):
                self.remove()
            raise

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _in_order(self, samples: Tensor, order: list[int], n_of: Callable[[int], int] = int) -> Tensor:
        """n_of: how many samples a window has, of how many weighed ones."""
        if order == sorted(order):
            return samples
        counts = [min(n_of(n_samples_of(w, self.n_windows)), self.seq_len - self.sinks) for w in order]
        rows = dict(zip(order, samples.split(counts), strict=True))
        return torch.cat([rows[w] for w in sorted(order)])


class Seldom:
    """Calls `save` now and then, so that it takes at most 5% of the time."""

    def __init__(self, save: Callable[[Moments], None]) -> None:
        self._save, self._last, self._seconds = save, 0.0, 0.0

    def __call__(self, moments: Moments) -> bool:
        """Return whether it was saved now."""
        started = time.monotonic()
        if not self._last:  # from the first window on; a worker has loaded its model before
            self._last, self._seconds = started, max(0.05, moments.nbytes / _SAVED_BYTES)
        if started - self._last < self._seconds / _SAVING_SHARE:
            return False
        self._save(moments)
        self._last = time.monotonic()
        self._seconds = self._last - started
        return True
