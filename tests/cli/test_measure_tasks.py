"""The recipe that measures tasks and long contexts of several outputs, on tiny ones."""

from __future__ import annotations

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.conftest import WORDS

RECIPE = Path(__file__).parents[2] / "recipes" / "measure_tasks.py"


class Terminal:
    """A stdout that keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def reconfigure(self, **_: object) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.fixture
def recipe(monkeypatch, text, tmp_path):
    """recipe(*outputs, flags): what the recipe prints; its --work is tmp_path / "work"."""
    tasks = tmp_path / "ships.jsonl"
    records = [
        {"query": f"the sea was {word} and old ships lay", "choices": ["in bays", "books"], "gold": 0}
        for word in WORDS[:3]
    ]
    tasks.write_text("".join(json.dumps(record) + "\n" for record in records))
    small = ["--lengths", "700", "--prompts", "1", "--seq-len", "100", "--max-windows", "2", "--new-tokens", "4"]

    def run(*arguments):
        terminal = Terminal()
        files = ["--tasks", str(tasks), "--book", str(text), "--work", str(tmp_path / "work"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["measure_tasks.py", *map(str, arguments), *files, *small])
        monkeypatch.setattr(sys, "stdout", terminal)
        runpy.run_path(str(RECIPE), run_name="__main__")
        return terminal.text

    return run


@pytest.mark.filterwarnings("ignore")
def test_all_stages_of_two_outputs(recipe, compressed, tmp_path):
    outputs = [compressed(), compressed(keep=0.75)]
    printed = recipe("run", *outputs)
    names = [output.name for output in outputs]
    for stage in ("retrieval", "positions", "generation"):
        for name in names:
            assert (tmp_path / "work" / f"{name}-{stage}.json").is_file()
    for name in names:
        assert f"{name}: ratio in the last quarter" in printed
        assert f"{name}, multikey:" in printed
    answers = (tmp_path / "work" / "answers-tasks.jsonl").read_text().splitlines()
    assert len(answers) == 1 + 3 * 3 * 2  # the original once and two outputs; three documents, two choices
    # nothing is measured twice
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("*.json")}
    again = recipe("run", *outputs)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again.split("| passkey")[1] == printed.split("| passkey")[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'kvcompress[tasks]')")
def test_stock_numbers_are_ours(recipe, compressed):
    printed = recipe("stock", compressed())
    assert "| ships | acc |" in printed
    assert float(printed.rsplit(":", 1)[1]) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'kvcompress[tasks]')")
def test_answers_to_few_shot_questions_are_collected_elsewhere(recipe, compressed, tmp_path, monkeypatch):
    shots = ("--fewshot", "2", "--recent", "0", "--stages", "tasks")
    assert "6 requests" in recipe("prepare", compressed(), *shots)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)  # as where lm-eval is missing
        assert "compressed: 6 requests answered" in recipe("run", compressed(), *shots)
    work = tmp_path / "work"
    n_answers = len((work / "answers-tasks.jsonl").read_text().splitlines())
    monkeypatch.setattr("kvcompress.evaluate.scoring._score_batch", None)  # no model is run any more
    assert "| ships | acc_norm* |" in recipe("run", compressed(), *shots)
    assert len((work / "answers-tasks.jsonl").read_text().splitlines()) == n_answers
    (figures,) = work.glob("*-tasks.json")
    task = json.loads(figures.read_text())["tasks"][0]
    assert task["n_fewshot"] == 2 and task["compressed_share"] > 0.5
