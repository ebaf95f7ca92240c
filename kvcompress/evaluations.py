"""evaluations.json: what was measured on an output, one record for each protocol.

    {"format_version": 1, "evaluations": [{"kind": "perplexity", "protocol": {...}, ...}]}

The figures beside `kind` and `protocol` are those that the measuring command prints as JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.writer import atomic_file, explained_os_errors
from kvcompress.errors import CheckpointError

EVALUATIONS_FILE = "evaluations.json"
_FORMAT_VERSION = 1


def read_evaluations(directory: Path) -> list[dict[str, Any]]:
    """Return the records of an output, oldest protocol first; none where nothing was measured.

    Raises CheckpointError if the file is damaged or of a later format.
    """
    file = directory / EVALUATIONS_FILE
    if not file.exists():
        return []
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version, records = document["format_version"], document["evaluations"]
        for record in records:
            _ = record["kind"], record["protocol"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Remove it, or measure again elsewhere.") from error
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version}; this kvcompress reads {_FORMAT_VERSION}.")
    return list(records)


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
            document = {"format_version": _FORMAT_VERSION, "evaluations": records}
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
