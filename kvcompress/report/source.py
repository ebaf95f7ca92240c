"""Which model an output was made from, told without saying where it lay on somebody's disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: .../models--ORG--NAME/snapshots/REVISION, as huggingface_hub lays a model out.
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")


def hub_id(source: str) -> str | None:
    """Return ORG/NAME of a plan's source, given as such or as the hub's own cache directory; None for anything else."""
    if found := _SNAPSHOT.search(source):
        return f"{found[1]}/{found[2]}"
    return source if _HUB_ID.fullmatch(source) else None


def display_name(source: str) -> str:
    """Return the hub id where there is one, and otherwise the last part of the path."""
    return hub_id(source) or Path(source).name


def without_local_paths(document: Any) -> Any:
    """Return a JSON document in which every absolute path is only a name, fit to be given to others."""
    if isinstance(document, dict):
        return {without_local_paths(key): without_local_paths(value) for key, value in document.items()}
    if isinstance(document, list):
        return [without_local_paths(value) for value in document]
    if isinstance(document, str) and document.startswith("/"):
        return display_name(document)
    return document
