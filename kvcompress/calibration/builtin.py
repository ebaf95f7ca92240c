"""Texts of several kinds that come with this package: passages of books, and notes that were written for it.

Where they come from stands in assets/calibration/SOURCES.md. Text that comes with Python is read in `text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from kvcompress.errors import CalibrationError

#: source -> what it is. The order is that in which a short calibration takes them.
BUNDLED = {
    "builtin:essays": "history, philosophy and science",
    "builtin:notes": "an encyclopaedia's style, chats, mathematics, other languages and program code",
    "builtin:dialogue": "talk from novels",
    "builtin:narrative": "tales and novels",
    "builtin:plays": "plays and verse",
}
_PREFIX = "builtin:"
_DIRECTORY = files("kvcompress") / "assets" / "calibration"
#: Between passages, alone in its line.
_SEPARATOR = "\n\f\n"


def is_builtin(source: str) -> bool:
    """Return whether a source is named as one that comes with this package or with Python."""
    return source.startswith(_PREFIX)


def bundled_text(source: str) -> str:
    """Return the whole text of a bundled source. Raises CalibrationError if there is none of this name."""
    if source not in BUNDLED:
        known = ", ".join((*BUNDLED, "builtin:prose", "builtin:code"))
        raise CalibrationError(f"text {source} does not exist. Choose from {known}, or give a file.")
    return (_DIRECTORY / f"{source.removeprefix(_PREFIX)}.txt").read_text(encoding="utf-8")


def bundled_documents(source: str) -> Iterator[str]:
    """Yield the passages of a bundled source. Raises CalibrationError if there is none of this name."""
    yield from bundled_text(source).rstrip("\n").split(_SEPARATOR)
