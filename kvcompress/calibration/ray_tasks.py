"""Pieces of a calibration as tasks of Ray, on one machine or on many: its scheduler, its retries, nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import Job, Piece, note_repeated, sum_piece
from kvcompress.errors import CalibrationError, OptionError

_MOST_RETRIES = 5


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Tasks of a Ray cluster.

    address: "auto" for the cluster at hand, "local" for one that is started on this machine, or HOST:PORT. A task has a
    GPU where `device` is cuda, one CPU otherwise; the checkpoint must lie at the same path on every node.
    """

    address: str
    device: str = "cpu"

    @property
    def n(self) -> int:
        """How many tasks the cluster runs at a time."""
        resource = "GPU" if self.device.startswith("cuda") else "CPU"
        found = int(_connected(self.address).cluster_resources().get(resource, 0))
        if not found:
            raise OptionError(f"the Ray cluster at {self.address} has no {resource}.")
        return found

    def sums(self, job: Job, pieces: list[Piece]) -> Iterator[tuple[Piece, Moments]]:
        """Yield every piece with its moments. Raises CalibrationError where Ray gives a piece up."""
        ray = _connected(self.address)
        resources = {"num_gpus": 1} if self.device.startswith("cuda") else {"num_cpus": 1}
        attempts = ray.remote(num_cpus=0)(_Attempts).remote()
        task = ray.remote(max_retries=_MOST_RETRIES, **resources)(_sum)
        shared = ray.put(job)
        device = "cuda" if self.device.startswith("cuda") else "cpu"
        running = {task.remote(shared, piece, device, attempts): piece for piece in pieces}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            piece = running.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, CalibrationError) else error from None
            except ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CalibrationError(
                    f"Ray gave up windows {piece.start} to {piece.stop - 1} after {_MOST_RETRIES} retries ({reason}). "
                    "Look at its log, or calibrate without --ray."
                ) from error
            if ray.get(attempts.of.remote(piece.start)) > 1:
                note_repeated([piece], "a worker of the calibration died and Ray started another one")
            yield piece, found


def _connected(address: str) -> Any:
    """Return the package ray, connected. Raises OptionError where it is not installed or there is no cluster."""
    try:
        import ray
    except ImportError as error:
        raise OptionError("--ray needs the package ray: pip install 'kvcompress[ray]'.") from error
    if not ray.is_initialized():
        try:
            ray.init(None if address == "local" else address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OptionError(
                f"no Ray cluster answers at '{address}' ({reason}). Start one (ray start --head), or use --ray local."
            ) from error
    return ray


class _Attempts:
    """An actor that counts how often each piece was begun: a task does not know whether it is a retry."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}

    def begin(self, start: int) -> None:
        self._begun[start] = self._begun.get(start, 0) + 1

    def of(self, start: int) -> int:
        return self._begun.get(start, 0)


def _sum(job: Job, piece: Piece, device: str, attempts: Any) -> Moments:
    import ray

    ray.get(attempts.begin.remote(piece.start))
    return sum_piece(job, piece, device)
