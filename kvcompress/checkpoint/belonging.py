"""Whether the files of an output belong together, and lie in it: fingerprints, and symbolic links that lead out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kvcompress.documents import is_file_name
from kvcompress.errors import CheckpointError

MAPS_FILE = "kv_maps.safetensors"
_SAMPLES, _SAMPLE_BYTES = 16, 65536


def fingerprint(file: Path, *, n_samples: int = _SAMPLES) -> str:
    """Return a SHA-256 over a file's size and samples of 64 KiB, its first and last bytes among them.

    Samples instead of all of it, so that hundreds of gigabytes take seconds; the maps of two outputs differ everywhere.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with file.open("rb") as handle:
        for k in range(n_samples + 1):
            handle.seek(max(0, size - _SAMPLE_BYTES) * k // n_samples)
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprints(directory: Path) -> dict[str, str]:
    """Return {name: fingerprint} of the maps and weights (*.safetensors) of a directory."""
    return {file.name: fingerprint(file) for file in sorted(directory.glob("*.safetensors")) if file.is_file()}


def check_files(directory: Path, files: dict[str, str]) -> None:
    """Raise CheckpointError where a file that fingerprints were taken of is missing or another one."""
    for name, expected in files.items():
        if not is_file_name(name):
            raise CheckpointError(f"{directory}: its plan names a file '{name[:60]}' outside of it. Refused.")
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}, with which it was written. Compress or download it again."
            )
        if fingerprint(directory / name) != expected:
            raise CheckpointError(
                f"{directory}: {name} is not the file with which the plan was written: it was changed, or files of "
                "different outputs are mixed. Compress or download it again."
            )


def check_links(directory: Path) -> None:
    """Raise CheckpointError for a symbolic link that leads out of a directory: what it holds would be read and copied.

    The hub's own cache is a directory of links to its blobs, which are let through.
    """
    for link in links_out(directory):
        raise CheckpointError(
            f"{link} is a symbolic link to {link.readlink()}, outside of {directory}. Refused: copy the file there."
        )


def links_out(directory: Path) -> list[Path]:
    """Return the symbolic links below a directory that lead out of it."""
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # .../models--ORG--NAME/snapshots/REVISION
        allowed.append(root.parent.parent / "blobs")
    found = []
    for parent, directories, names in os.walk(directory):
        for name in (*directories, *names):
            path = Path(parent, name)
            if path.is_symlink() and not any(_target(path).is_relative_to(place) for place in allowed):
                found.append(path)
    return sorted(found)


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError):  # a circle of links leads nowhere
        return Path("/")
