"""Local tasks: JSONL files of questions with known answers, read and checked. Their format: docs/evaluation.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from kvcompress.documents import DocumentError, parse_json, read_json, read_text, shaped
from kvcompress.errors import OptionError

#: A file beside the tasks, {"name.jsonl": {"format": ..., "metric": ...}}; needed where the records do not tell.
SIDECAR = "TASKS.json"

#: Each format's metrics; the first one is its headline unless TASKS.json says otherwise.
METRICS = {
    "mc": ("acc_norm", "acc"),
    "contexts": ("acc",),
    "cloze": ("acc", "perplexity"),
    "cond": ("bits_per_byte",),
}


class _Entry(TypedDict):
    format: NotRequired[str]
    metric: NotRequired[str]


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task read from a file.

    format: a key of METRICS. headline: the metric to judge by. documents: the records; continuations begin with a
    space, ready to be scored.
    """

    name: str
    format: str
    headline: str
    documents: tuple[dict[str, Any], ...]

    def requests(self, document: dict[str, Any]) -> list[tuple[str, str]]:
        """Return the (context, continuation) pairs that must be scored to answer a document."""
        if self.format == "mc":
            return [(document["query"], " " + choice) for choice in document["choices"]]
        if self.format == "contexts":
            return [(context, " " + document["target"]) for context in document["contexts"]]
        return [(document["context"], document["target"])]


def find_task_files(name: str) -> list[Path]:
    """Return the task files that a name on the command line means: a .jsonl file, or all in a directory.

    Empty if it is neither: then it is one of lm-eval's own tasks. Raises OptionError for a file that is not there.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise OptionError(f"{name} holds no task files (*.jsonl).")
        return files
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise OptionError(f"task file {name} does not exist.")
        return [path]
    return []


def load_task(file: Path) -> LocalTask:
    """Return the task in a JSONL file. Raises OptionError with the line that is wrong."""
    try:
        lines = read_text(file).splitlines()
        entry = _sidecar_entry(file)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the task {file}: {error}.") from error
    records = [(n, _record(line, file, n)) for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise OptionError(f"task {file} holds no documents.")
    kind = entry.get("format") or _guess_format(records[0][1], file)
    if kind not in METRICS:
        raise OptionError(f"{file.parent / SIDECAR}: format '{kind}' is unknown. Choose from {', '.join(METRICS)}.")
    documents = tuple(_READERS[kind](record, f"{file}, line {n}") for n, record in records)
    first_word = re.match(r"\w+", str(entry.get("metric", "")))
    headline = first_word[0] if first_word and first_word[0] in METRICS[kind] else METRICS[kind][0]
    return LocalTask(file.stem, kind, headline, documents)


def _sidecar_entry(file: Path) -> dict[str, Any]:
    sidecar = file.parent / SIDECAR
    if not sidecar.is_file():
        return {}
    try:
        entry = read_json(sidecar).get(file.name, {})
        return dict(shaped(entry, _Entry)) if isinstance(entry, dict) else {}
    except DocumentError as error:
        raise OptionError(f"{sidecar} is no JSON object of file names ({error}).") from error


def _record(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except DocumentError as error:
        raise OptionError(f"{file}, line {number}: not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise OptionError(f"{file}, line {number}: expected an object.")
    return record


def _guess_format(record: dict[str, Any], file: Path) -> str:
    for field, kind in (("choices", "mc"), ("contexts", "contexts"), ("context", "cloze")):
        if field in record:
            return kind
    raise OptionError(f"{file}, line 1: expected the field choices, contexts or context (docs/evaluation.md).")


def _choice(record: dict[str, Any], where: str) -> dict[str, Any]:
    choices = _texts(record, "choices", where)
    return {"query": _text(record, "query", where), "choices": choices, "gold": _gold(record, len(choices), where)}


def _contexts(record: dict[str, Any], where: str) -> dict[str, Any]:
    contexts = _texts(record, "contexts", where)
    gold = _gold(record, len(contexts), where)
    return {"contexts": contexts, "target": _text(record, "target", where), "gold": gold}


def _cloze(record: dict[str, Any], where: str) -> dict[str, Any]:
    return {"context": _text(record, "context", where), "target": " " + _text(record, "target", where)}


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise OptionError(f"{where}: field {field} must be a text, found {value!r}.")
    return value


def _texts(record: dict[str, Any], field: str, where: str) -> list[str]:
    value = record.get(field)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v for v in value):
        raise OptionError(f"{where}: field {field} must be a list of two texts or more, found {value!r}.")
    return value


def _gold(record: dict[str, Any], n: int, where: str) -> int:
    gold = record.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < n:
        raise OptionError(f"{where}: field gold must be a number from 0 to {n - 1}, found {gold!r}.")
    return gold


_READERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "mc": _choice,
    "contexts": _contexts,
    "cloze": _cloze,
    "cond": _cloze,
}
