"""Pieces of a calibration on the devices of this host: a process each, with a model of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import Job, Piece, note_repeated, sum_piece
from kvcompress.errors import CalibrationError, OptionError

#: How often pieces are given to new processes, after theirs died, before that is no accident.
_MOST_DEATHS = 5


@dataclass(frozen=True, slots=True)
class LocalWorkers:
    """A process for each device: ("cuda:0", "cuda:1"), or ("cpu", "cpu") for two processes on the CPU."""

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.devices:
            raise OptionError("no device was named for the workers of the calibration.")

    @property
    def n(self) -> int:
        return len(self.devices)

    def sums(self, job: Job, pieces: list[Piece]) -> Iterator[tuple[Piece, Moments]]:
        """Yield every piece with its moments. Raises CalibrationError where workers die again and again.

        Sums travel through files: those of a large model are gigabytes, of which a pipe would make copies.
        """
        left, deaths = list(pieces), 0
        with tempfile.TemporaryDirectory(prefix="kvcompress-pieces-") as scratch:
            while left:
                try:
                    for piece, file in self._round(job, left, Path(scratch)):
                        found = Moments.load(file)
                        file.unlink()
                        left.remove(piece)
                        yield piece, found
                except BrokenProcessPool as error:
                    deaths += 1
                    if deaths >= _MOST_DEATHS:
                        raise CalibrationError(
                            f"a worker of the calibration died {deaths} times, last with windows {left[0].start} on. "
                            "It may have run out of memory: give fewer devices, or a smaller --seq-len."
                        ) from error
                    note_repeated(left[: self.n], "a worker of the calibration died")

    def _round(self, job: Job, pieces: list[Piece], scratch: Path) -> Iterator[tuple[Piece, Path]]:
        """Yield pieces as they are done, until all are or a worker dies, which ends the others of its pool."""
        context = multiprocessing.get_context("spawn")  # a process that is forked cannot use a GPU
        devices = context.SimpleQueue()
        for device in self.devices:
            devices.put(device)
        with ProcessPoolExecutor(self.n, context, initializer=_begin, initargs=(devices,)) as pool:
            running: dict[Future[str], Piece] = {
                pool.submit(_sum_to_file, job, piece, str(scratch)): piece for piece in pieces
            }
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), Path(future.result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def workers_on_gpus(asked: str) -> LocalWorkers:
    """Return a worker for each GPU that is asked for: all, so many (2), or these (0,3). Raises OptionError."""
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
    return LocalWorkers(tuple(f"cuda:{i}" for i in chosen))


_DEVICE: list[str] = []


def _begin(devices: Any) -> None:
    """Take a device for this process, which keeps it."""
    import torch

    _DEVICE.append(devices.get())
    torch.set_num_threads(max(1, torch.get_num_threads() // (os.cpu_count() or 1)))


def _sum_to_file(job: Job, piece: Piece, scratch: str) -> str:
    file = Path(scratch) / f"{piece.start}-{piece.stop}.safetensors"
    sum_piece(job, piece, _DEVICE[0]).save(file)
    return str(file)
