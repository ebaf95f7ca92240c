"""Maps of more sites than memory holds: each site's in a file of its own, joined at the end, a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.maps import SiteMaps, load_site, save_maps
from kvcompress.model.model_spec import Site

#: A safetensors file begins with the length of its header.
_LENGTH_BYTES = 8
#: Its library writes tensors of the last of these first, so that all are aligned; those of one dtype by name.
_DTYPE_ORDER = ("U8", "F16", "I32", "F32")


class SpilledMaps(MutableMapping[Site, SiteMaps]):
    """Maps by site, in files of a directory; what is asked for is read, memory-mapped."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._files = directory, dict[Site, Path]()

    def __setitem__(self, site: Site, maps: SiteMaps) -> None:
        written, file = self._directory / f"{site}.new", self._directory / f"{site}.safetensors"
        save_maps({site: maps}, written)  # not over what these very maps may be read from
        self._files[site] = written.replace(file)

    def __getitem__(self, site: Site) -> SiteMaps:
        return load_site(self._files[site])

    def __delitem__(self, site: Site) -> None:
        self._files.pop(site).unlink()

    def __iter__(self) -> Iterator[Site]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def save(self, file: Path) -> None:
        """Write all maps as one file, to the byte what `save_maps` writes."""
        found = [(own, begin, name, entry) for own in self._files.values() for begin, name, entry in _entries(own)]
        found.sort(key=lambda f: (-_DTYPE_ORDER.index(f[3]["dtype"]), f[2]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for _, _, name, entry in found:
            first, last = entry["data_offsets"]
            header[name] = entry | {"data_offsets": [place, place + last - first]}
            place += last - first
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for own, begin, _, entry in found:
                first, last = entry["data_offsets"]
                with own.open("rb") as source:
                    source.seek(begin + first)
                    out.write(source.read(last - first))


def _entries(file: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Return (where the file's numbers begin, name, entry) of every tensor of a file that was written here."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
        found: dict[str, Any] = json.loads(handle.read(length))
    return [(_LENGTH_BYTES + length, name, entry) for name, entry in found.items() if name != "__metadata__"]
