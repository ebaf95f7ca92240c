"""Who does the work of a calibration: this process, the GPUs of this host, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvcompress.errors import OptionError

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

_PANEL = "Where it runs"
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Share the work out among GPUs of this host: all, 2, or 0,3.", rich_help_panel=_PANEL
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Work as tasks of a Ray cluster: auto, local, or HOST:PORT.",
        rich_help_panel=_PANEL,
    ),
]
PerGpu = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Processes of --gpus, tasks of --ray that share a GPU: a small model leaves it waiting.",
        rich_help_panel=_PANEL,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Calibrate within this much memory (20GB): layers of a larger model come from disk.",
        rich_help_panel=_PANEL,
    ),
]


def n_bytes(memory: str | None) -> int | None:
    """Return the bytes of a size that was given. Raises OptionError."""
    if memory is None:
        return None
    from kvcompress.calibration.memory import parse_bytes

    return parse_bytes(memory)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the work is shared out, as was asked for; by default this process does it. Raises OptionError."""

    gpus: str | None = None
    ray: str | None = None
    per_gpu: int = 1

    def __post_init__(self) -> None:
        if self.gpus is not None and self.ray is not None:
            raise OptionError("--gpus shares out on this host, --ray on a cluster. Give one of them.")
        if self.per_gpu > 1 and not self.is_asked:
            raise OptionError("--per-gpu is for processes of --gpus and tasks of --ray. Give one of them.")

    @property
    def is_asked(self) -> bool:
        return self.gpus is not None or self.ray is not None

    def wake(self, device: str) -> None:
        """Let a Ray cluster's workers import what they need from now on, beside this process. Raises OptionError."""
        if self.ray is not None and device != "cpu":
            from kvcompress.calibration import ray_cluster

            ray_cluster.wake(self.ray, self.per_gpu)

    @contextmanager
    def at_work(self, device: str) -> Iterator[Workers | None]:
        """Yield who does the work, None for this process; processes of ours end with the block. Raises OptionError.

        A rank of torchrun that does not lead does here what the first one hands out, and ends.
        """
        chosen = self._workers(device)
        if chosen is not None and not chosen.leads:
            chosen.serve()  # type: ignore[attr-defined]
            raise typer.Exit
        try:
            yield chosen
        finally:
            if chosen is not None:
                chosen.close()

    def _workers(self, device: str) -> Workers | None:
        if self.ray is not None:
            from kvcompress.calibration.ray_tasks import RayWorkers
            from kvcompress_cli.loading import resolve_device

            return RayWorkers(self.ray, resolve_device(device), self.per_gpu)
        if _is_rank():
            from kvcompress.calibration.ranks import RankWorkers
            from kvcompress_cli.loading import resolve_device

            if self.gpus is not None:
                raise OptionError("torchrun has begun a process for each GPU already. Leave out --gpus.")
            return RankWorkers(resolve_device(device))
        if self.gpus is not None:
            from kvcompress.calibration.processes import workers_on_gpus

            return workers_on_gpus(self.gpus, self.per_gpu)
        return None


def _is_rank() -> bool:
    """Return whether torchrun began this process, and others beside it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
