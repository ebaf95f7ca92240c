"""evaluations.json: one record for each protocol, written whole, also by processes that run at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompress.errors import CheckpointError, OutputError
from kvcompress.evaluations import EVALUATIONS_FILE, read_evaluations, record_evaluation


def test_nothing_was_measured(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []


def test_records_are_keyed_by_kind_and_protocol(tmp_path: Path) -> None:
    record_evaluation(tmp_path, "perplexity", {"kl_nats": 1.0, "protocol": {"text": "a", "recent": 64}})
    record_evaluation(tmp_path, "perplexity", {"kl_nats": 2.0, "protocol": {"text": "b", "recent": 64}})
    record_evaluation(tmp_path, "tasks", {"score": 3.0, "protocol": {"text": "a", "recent": 64}})
    returned = record_evaluation(tmp_path, "perplexity", {"kl_nats": 4.0, "protocol": {"recent": 64, "text": "a"}})
    records = read_evaluations(tmp_path)
    assert records == returned
    assert [(r["kind"], r.get("kl_nats", r.get("score"))) for r in records] == [
        ("perplexity", 4.0),
        ("perplexity", 2.0),
        ("tasks", 3.0),
    ]
    assert [p.name for p in tmp_path.iterdir()] == [EVALUATIONS_FILE]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format_version": 1, "evaluations": [{"kind": "x"}]}', "damaged"),
        ('{"format_version": 1, "evaluations": [{"kind": "x", "protocol": 3}]}', "damaged"),
        ('{"format_version": 2, "evaluations": []}', "format version 2"),
    ],
)
def test_a_damaged_file_is_told_and_kept(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / EVALUATIONS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_evaluations(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        record_evaluation(tmp_path, "perplexity", {"protocol": {}})
    assert (tmp_path / EVALUATIONS_FILE).read_text() == text


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        record_evaluation(tmp_path / "gone", "perplexity", {"protocol": {}})


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from kvcompress.evaluations import record_evaluation
for i in range(25):
    record_evaluation(Path(sys.argv[1]), "perplexity", {"protocol": {"text": sys.argv[2], "i": i}})
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in ("a", "b", "c")]
    assert [run.wait() for run in runs] == [0, 0, 0]
    found = {(r["protocol"]["text"], r["protocol"]["i"]) for r in read_evaluations(tmp_path)}
    assert found == {(name, i) for name in "abc" for i in range(25)}
    assert json.loads((tmp_path / EVALUATIONS_FILE).read_text())["format_version"] == 1
