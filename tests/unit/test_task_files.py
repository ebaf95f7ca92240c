"""Local task files: every format, what is guessed, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import OptionError
from kvcompress.evaluate.task_files import find_task_files, load_task

CHOICE = {"query": "Two and two are", "choices": ["four.", "five."], "gold": 0}
CONTEXTS = {"contexts": ["The cup fell so the cup", "The cup fell so the floor"], "target": "broke.", "gold": 0}
CLOZE = {"context": "The sun rises in the", "target": "east"}


def write(directory: Path, *records: Any, name: str = "task.jsonl", **sidecar: Any) -> Path:
    file = directory / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if sidecar:
        (directory / "TASKS.json").write_text(json.dumps({name: sidecar}))
    return file


@pytest.mark.parametrize(("record", "kind"), [(CHOICE, "mc"), (CONTEXTS, "contexts"), (CLOZE, "cloze")])
def test_the_format_is_read_from_the_fields(tmp_path: Path, record: dict[str, Any], kind: str) -> None:
    task = load_task(write(tmp_path, record, record))
    assert (task.name, task.format, len(task.documents)) == ("task", kind, 2)


def test_requests_put_a_space_before_what_is_scored(tmp_path: Path) -> None:
    def requests(record: dict[str, Any]) -> list[tuple[str, str]]:
        task = load_task(write(tmp_path, record))
        return task.requests(task.documents[0])

    assert requests(CHOICE) == [("Two and two are", " four."), ("Two and two are", " five.")]
    assert requests(CONTEXTS) == [(context, " broke.") for context in CONTEXTS["contexts"]]
    assert requests(CLOZE) == [("The sun rises in the", " east")]


def test_the_sidecar_chooses_format_and_headline(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, CLOZE, format="cond", metric="bits/byte of target")).headline == "bits_per_byte"
    assert load_task(write(tmp_path, CHOICE, format="mc", metric="acc; acc_norm")).headline == "acc"
    assert (
        load_task(write(tmp_path, CHOICE, format="mc", metric="acc_norm (by characters); acc")).headline == "acc_norm"
    )
    assert load_task(write(tmp_path, CHOICE, name="other.jsonl")).headline == "acc_norm"


def test_names_that_mean_files(tmp_path: Path) -> None:
    first, second = write(tmp_path, CHOICE, name="b.jsonl"), write(tmp_path, CHOICE, name="a.jsonl")
    assert find_task_files(str(tmp_path)) == [second, first]
    assert find_task_files(str(first)) == [first]
    assert find_task_files("hellaswag") == []
    with pytest.raises(OptionError, match=r"nowhere\.jsonl does not exist"):
        find_task_files(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="holds no task files"):
        find_task_files(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a", "b"], "gold": 0}, "field query must be a text"),
        (CHOICE | {"choices": ["only one"]}, "field choices must be a list of two texts"),
        (CHOICE | {"gold": 2}, "field gold must be a number from 0 to 1"),
        (CHOICE | {"gold": True}, "field gold"),
        (CONTEXTS | {"target": 3}, "field target must be a text"),
        (CLOZE | {"target": ""}, "field target must be a text"),
        ([1, 2], "expected an object"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    good = CHOICE if not isinstance(record, dict) or "choices" in record else CONTEXTS
    good = CLOZE if isinstance(record, dict) and "context" in record else good
    with pytest.raises(OptionError, match=rf"task\.jsonl, line 2: {message}"):
        load_task(write(tmp_path, good, record))


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected the field choices, contexts or context"):
        load_task(write(tmp_path, {"text": "a book"}))
    with pytest.raises(OptionError, match="holds no documents"):
        load_task(write(tmp_path))
    with pytest.raises(OptionError, match="format 'essay' is unknown"):
        load_task(write(tmp_path, CHOICE, format="essay"))
    (tmp_path / "broken.jsonl").write_text('{"query": ')
    with pytest.raises(OptionError, match=r"broken\.jsonl, line 1: not valid JSON"):
        load_task(tmp_path / "broken.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "caf\xe9"}')
    with pytest.raises(OptionError, match="cannot read the task"):
        load_task(tmp_path / "latin.jsonl")
    (tmp_path / "TASKS.json").write_text("[]")
    with pytest.raises(OptionError, match="is no JSON object"):
        load_task(write(tmp_path, CHOICE))
