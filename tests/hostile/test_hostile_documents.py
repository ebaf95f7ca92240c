"""Reports, comparisons, evaluations, tasks, recipes and answers of others: refused in one line, or read right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import CheckpointError, KVCompressError, OptionError, OutputError
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.task_files import load_task
from kvcompress.evaluations import EVALUATIONS_FILE, read_evaluations, record_evaluation
from kvcompress.options import CompressOptions, load_recipe
from kvcompress.pipeline import compress
from kvcompress.plan import REPORT_FILE
from kvcompress.report.card import measured_section
from kvcompress.report.comparison import comparison_table
from kvcompress.report.stored import read_report
from kvcompress.report.stored_comparison import COMPARISON_FILE, read_comparison

COMPARISON = Path(__file__).parents[2] / "docs" / "comparison-smollm2" / COMPARISON_FILE
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def pristine(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two outputs of one model, of equal sizes but for the window."""
    made = []
    for recent in (4, 5):
        made.append(tmp_path_factory.mktemp("pristine") / "out")
        options = CompressOptions(metric="weights", policy="uniform", recent=recent, keep=0.5)
        compress(tiny_checkpoint("llama-gqa"), made[-1], options)
    return made


@pytest.fixture
def output(pristine: list[Path], tmp_path: Path) -> Path:
    shutil.copytree(pristine[0], tmp_path / "out")
    return tmp_path / "out"


def refusal(kind: type[KVCompressError], read: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(KVCompressError) as error:
        read(*args)
    assert error.type is kind
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: Path, change: Change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


REPORTS: dict[str, Change] = {
    "no sizes": lambda d: d.pop("cache_bytes"),
    "sizes of another kind": lambda d: d.update(cache_bytes={"a": 1}),
    "a size of zero": lambda d: d["cache_bytes"][0].update(original=0),
    "a rank as a text": lambda d: d["layers"][0]["key"].update(rank="many"),
    "a width of zero": lambda d: d["layers"][0]["key"].update(width=0),
    "no layers": lambda d: d.update(layers=[]),
    "bits that are no number": lambda d: d["layers"][0]["key"].update(bits_histogram={"four": 1}),
    "a loss of a list": lambda d: d.update(predicted_loss_nats=[]),
    "options as a list": lambda d: d.update(options=[]),
    "texts of a number": lambda d: d["calibration"].update(sources=3),
    "a model that is no text": lambda d: d.update(model=["x"]),
    "energies of texts": lambda d: d["energies"].update({"layers.0.key": ["x"]}),
    "a keep of a text": lambda d: d.update(keep="x"),
}


@pytest.mark.parametrize("damage", REPORTS)
def test_reports(output: Path, damage: str) -> None:
    edit(output / REPORT_FILE, REPORTS[damage])
    assert "report.json is damaged" in refusal(CheckpointError, read_report, output)


def test_a_report_of_another_output(output: Path, pristine: list[Path]) -> None:
    read_report(output)
    shutil.copy(pristine[1] / REPORT_FILE, output)
    assert "another output" in refusal(CheckpointError, read_report, output)


def test_evaluations_of_another_output(output: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    options = CompressOptions(metric="weights", policy="uniform", recent=4, keep=0.5)
    compress(tiny_checkpoint("llama-gqa", seed=1), tmp_path / "other", options)
    record_evaluation(tmp_path / "other", "perplexity", {"protocol": {"text": "a", "recent": 4}})
    shutil.copy(tmp_path / "other" / EVALUATIONS_FILE, output)
    assert "other maps" in refusal(CheckpointError, read_evaluations, output)


@pytest.mark.parametrize(
    "record",
    [
        {"kind": [], "protocol": {}},
        {"kind": "perplexity", "protocol": {"text": 3}},
        {"kind": "perplexity", "protocol": {"windows": "many"}},
        {"kind": "perplexity", "protocol": {}, "perplexity": {"ratio": "one"}},
        {"kind": "perplexity", "protocol": {}, "kl_nats": None},
    ],
    ids=json.dumps,
)
def test_evaluations(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / EVALUATIONS_FILE).write_text(json.dumps({"format_version": 1, "evaluations": [record]}))
    assert "damaged" in refusal(CheckpointError, read_evaluations, tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "perplexity", "protocol": {}},
        {"kind": "perplexity", "protocol": {"windows": 3}},
        {"kind": "tasks", "protocol": {}, "tasks": [{"task": [], "n_documents": "x", "metrics": 3}]},
        {"kind": "retrieval", "protocol": {}, "cells": [{"depth": [], "length": {}, "kind": 1}]},
        {"kind": "positions", "protocol": {}, "quarters": [{"start": "a", "stop": None}]},
        {"kind": "generation", "protocol": {}, "common_prefix": "long"},
        {"kind": "of another version", "protocol": {"x": [{}]}, "deep": {"a": {"b": [1]}}},
    ],
    ids=json.dumps,
)
def test_evaluations_of_another_shape_are_listed(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / EVALUATIONS_FILE).write_text(json.dumps({"format_version": 1, "evaluations": [record]}))
    assert "measured" in measured_section(read_evaluations(tmp_path))


COMPARISONS: dict[str, Change] = {
    "no cells": lambda d: d.pop("cells"),
    "cells of another kind": lambda d: d.update(cells=[3]),
    "a ratio as a text": lambda d: d["cells"][0].update(ratio="x"),
    "a cell without bytes": lambda d: d["cells"][0].pop("bytes_per_token"),
    "windows of another number": lambda d: d["cells"][0]["log_ratios"].pop(),
    "lengths of another kind": lambda d: d["original"].update(cache_bytes={"long": 1}),
    "a length that a cell lacks": lambda d: d["cells"][0].update(cache_bytes={}),
    "a verdict that is none": lambda d: d["verdicts"]["ratio"][0].update(verdict="best"),
    "verdicts of a number": lambda d: d.update(verdicts=1),
    "a protocol without a text": lambda d: d["protocol"].pop("text"),
    "a machine of a list": lambda d: d.update(machine=[]),
    "keeps of texts": lambda d: d["request"].update(keeps=["x"]),
    "a keep of a list": lambda d: d["cells"][0].update(keep_asked=[]),
    "an earlier version": lambda d: d.update(format_version=0),
    "a version of a list": lambda d: d.update(format_version=[]),
}


@pytest.mark.parametrize("damage", COMPARISONS)
def test_comparisons(tmp_path: Path, damage: str) -> None:
    shutil.copy(COMPARISON, tmp_path)
    assert "Decode-faithful" in comparison_table(read_comparison(tmp_path / COMPARISON_FILE))
    edit(tmp_path / COMPARISON_FILE, COMPARISONS[damage])
    assert "is damaged" in refusal(OutputError, read_comparison, tmp_path / COMPARISON_FILE)


@pytest.mark.parametrize(
    "text",
    [
        "tokens = 1" + "0" * 30,
        "seq_len = 9999999999",
        "turn = 1" + "0" * 40,
        "seed = 1" + "0" * 30,
        "keep = []",
        "keep = nan",
        "key_basis = []",
        "calibration = 3",
        "calibration = [3]",
        "group = true",
        "folded = 1",
        "layers = 3",
        "turn = {}",
        "[tokens]\na = 1",
        "a = " + "[" * 5000,
        "x" * 70_000,
        "keep = 1979-05-27T07:32:00Z",
    ],
    ids=lambda t: t[:24],
)
def test_recipes(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    refusal(OptionError, load_recipe, tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("line", "sidecar"),
    [
        ("[" * 100_000, None),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1' + "0" * 30 + "}", None),
        ('{"query": "a", "choices": ["\\ud800", "c"], "gold": 1}', None),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1}', '{"t.jsonl": {"format": []}}'),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1}', "[" * 100_000),
        ('{"query": "a", "choices": ["b", "c"], "gold": 1}', '{"t.jsonl": {"format": "cond"}}'),
    ],
    ids=lambda t: str(t)[:30],
)
def test_tasks(tmp_path: Path, line: str, sidecar: str | None) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n")
    if sidecar:
        (tmp_path / "TASKS.json").write_text(sidecar)
    refusal(OptionError, load_task, tmp_path / "t.jsonl")


@pytest.mark.parametrize("line", ["[1, 2, 3]", '["a", "b", {}]', '["a", "b", [1]]', '["a", "b"]', "[" * 100_000])
def test_answers(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"format": "kvcompress answers", "version": 1}\n' + line + "\n")
    assert "damaged" in refusal(OptionError, Answers, tmp_path / "a.jsonl")
