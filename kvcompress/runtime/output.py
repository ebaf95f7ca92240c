"""The plan and the maps of an output, read and held against each other, and the original that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcompress.checkpoint.belonging import check_files
from kvcompress.checkpoint.maps import SiteMaps, load_maps
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import Site
from kvcompress.plan import Plan


def read_output(directory: Path) -> tuple[Plan, dict[Site, SiteMaps]]:
    """Return the plan and the maps of an output. Raises CheckpointError if they are damaged or do not fit together."""
    plan = Plan.load(directory)
    maps = load_maps(directory, most=plan.most_maps_bytes)
    for site in plan.sites:
        found = maps.pop(site.site, None) if site.exact else maps.get(site.site)
        size = (0, 0, 0) if found is None else (len(found.block), found.blocks.numel(), found.blocks.shape[1])
        planned = (0, 0, 0) if site.exact else (site.rank, site.width, site.block_width)
        if size != planned or (found is not None and tuple(found.bits.tolist()) != site.component_bits):
            raise CheckpointError(
                f"{directory}: the maps of {site.site} keep {size[0]} of {size[1]} numbers in blocks of {size[2]}, the "
                f"plan says {planned[0]} of {planned[1]} in blocks of {planned[2]}, or their bits differ. "
                "The files are of different outputs: compress again."
            )
    strangers = set(maps) - {site.site for site in plan.sites}
    if strangers:
        raise CheckpointError(
            f"{directory} holds maps of {min(strangers)}, which its plan does not name. Compress again."
        )
    check_files(directory, plan.files)
    return plan, maps


@contextmanager
def original_of(directory: Path, plan: Plan, base: str | None) -> Iterator[Path]:
    """Yield where the original checkpoint lies as a directory: `base`, or the source that the plan names.

    Raises CheckpointError if it is not here, or not the one that the output was made from.
    """
    source = base or plan.source
    if not base and Path(source).is_absolute() and not Path(source).exists():
        raise CheckpointError(f"{directory} needs its original, and {source} is not here. Name it with --base.")
    with open_checkpoint(source) as checkpoint:
        if checkpoint.fingerprint() != plan.source_fingerprint:
            raise CheckpointError(
                f"{source} is not the checkpoint that {directory} was made from (its fingerprint differs). "
                "Name that one with --base."
            )
        yield checkpoint.path
