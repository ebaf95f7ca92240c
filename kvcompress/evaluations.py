"""evaluations.json: what was measured on an output, one record for each protocol.

    {"format_version": 1, "maps": "1f2e...", "evaluations": [{"kind": "perplexity", "protocol": {...}, ...}]}

The figures beside `kind` and `protocol` are those that the measuring command prints as JSON. `maps` is the fingerprint
of the maps that were measured.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from kvcompress.checkpoint.belonging import MAPS_FILE, fingerprint
from kvcompress.checkpoint.writer import atomic_file, explained_os_errors
from kvcompress.documents import DocumentError, Within, read_json, shaped
from kvcompress.errors import CheckpointError

EVALUATIONS_FILE = "evaluations.json"
_FORMAT_VERSION = 1


_Text = Annotated[str, Within(0, 4096)]
_Tokens = Annotated[int, Within(0, 1 << 40)]


class _Protocol(TypedDict):
    text: NotRequired[_Text]
    text_sha256: NotRequired[_Text]
    seq_len: NotRequired[_Tokens]
    windows: NotRequired[_Tokens]
    sinks: NotRequired[_Tokens]
    recent: NotRequired[_Tokens]
    dtype: NotRequired[_Text]


class _Perplexity(TypedDict):
    original: float
    compressed: float
    ratio: float


class _Record(TypedDict):
    """What every kind has; the figures of `eval --text` by their names, others as they are (report.measured_tables)."""

    kind: _Text
    protocol: _Protocol
    perplexity: NotRequired[_Perplexity]
    kl_nats: NotRequired[float]
    top1_agreement: NotRequired[float]


class _Document(TypedDict):
    format_version: Annotated[int, Within(0, 1 << 30)]
    maps: NotRequired[_Text]
    evaluations: list[_Record]


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """Return the records of an output, oldest protocol first; none where nothing was measured.

    Raises CheckpointError if the file is damaged, of a later format, or was measured on other maps.
    """
    file = directory / EVALUATIONS_FILE
    if not file.exists():
        return []
    try:  # a perplexity may be infinite
        document = read_json(file, finite=False)
        version = document.get("format_version")
        if isinstance(version, int) and version != _FORMAT_VERSION:
            raise CheckpointError(f"{file} has format version {version}; this kvcompress reads {_FORMAT_VERSION}.")
        document = shaped(document, _Document)
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Remove it, or measure again elsewhere.") from error
    if document.get("maps", found := _maps_fingerprint(directory)) != found:
        raise CheckpointError(f"{file} was measured on other maps than those beside it. Remove it, and measure again.")
    return list(document["evaluations"])


def _maps_fingerprint(directory: Path) -> str | None:
    return fingerprint(directory / MAPS_FILE) if (directory / MAPS_FILE).is_file() else None


def record_evaluation(directory: Path, kind: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Add figures, which hold their `protocol`, to an output's records and return all of them.

    A record of the same kind and protocol is replaced. Two processes that record at once both succeed.
    Raises CheckpointError if the file is damaged, OutputError if the directory cannot be written.
    """
    record = json.loads(json.dumps({"kind": kind, **figures}))  # as it will be read: tuples are lists
    with _locked(directory):
        records = read_evaluations(directory)
        same = [i for i, old in enumerate(records) if _key(old) == _key(record)]
        if same:
            records[same[0]] = record
        else:
            records.append(record)
        with atomic_file(directory / EVALUATIONS_FILE) as scratch:
            maps = _maps_fingerprint(directory)
            document = {"format_version": _FORMAT_VERSION, **({"maps": maps} if maps else {}), "evaluations": records}
            scratch.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return records


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record["kind"], record["protocol"]], sort_keys=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's own lock, which leaves no file behind and ends with the process."""
    with explained_os_errors(directory):
        handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
