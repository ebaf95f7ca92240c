"""Who does the work of a calibration: this process, the GPUs of this host, or a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

_PANEL = "Where it runs"
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Share the calibration out among GPUs of this host: all, 2, or 0,3.", rich_help_panel=_PANEL
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Calibrate as tasks of a Ray cluster: auto, local, or HOST:PORT.",
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


def workers(gpus: str | None, ray: str | None, device: str) -> Workers | None:
    """Return who sums the calibration's windows, None for this process. Raises OptionError."""
    from kvcompress.errors import OptionError

    if gpus is not None and ray is not None:
        raise OptionError("--gpus shares out on this host, --ray on a cluster. Give one of them.")
    if ray is not None:
        from kvcompress.calibration.ray_tasks import RayWorkers
        from kvcompress_cli.loading import resolve_device

        return RayWorkers(ray, resolve_device(device))
    if gpus is not None:
        from kvcompress.calibration.processes import workers_on_gpus

        return workers_on_gpus(gpus)
    return None
