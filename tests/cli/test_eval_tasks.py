"""`kvcompress eval --tasks`, `--retrieval`, `--by-position` and `--generation` on small outputs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install 'kvcompress[tasks]')"
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "ships.jsonl"
    records = [
        {"query": "the sea was calm and old ships lay", "choices": ["in bays", "books"], "gold": i % 2}
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_side_by_side(kvcompress, any_form, task, tmp_path):
    answers = tmp_path / "answers.jsonl"
    options = ("--tasks", f"{task}", "--limit", "4", "--answers", answers)
    outcome = kvcompress("eval", any_form, *options, "--json")
    assert outcome.code == 0
    document = json.loads(outcome.stdout)
    assert set(document) == {"tasks", "average", "keep", "protocol"}
    (row,) = document["tasks"]
    assert (row["task"], row["n_documents"]) == ("ships", 4)
    assert {m["metric"] for m in row["metrics"]} == {"acc", "acc_norm"}
    assert row["metrics"][0]["paired"]["n"] == 4
    n_answers = len(answers.read_text().splitlines())
    table = kvcompress("eval", any_form, *options)
    assert table.code == 0 and len(answers.read_text().splitlines()) == n_answers  # nothing was asked again
    assert "ships" in table.stdout and "acc_norm*" in table.stdout and "average of *" in table.stdout
    assert "±" in table.stdout and "keep 0.5000" in table.stdout


@pytest.mark.parametrize("more", [(), ("--engine", "vllm")])
def test_what_tasks_need_is_seen_before_an_output_is_opened(fails, monkeypatch, tmp_path, task, more):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'kvcompress[tasks]'" in fails("eval", tmp_path / "none", "--tasks", task, *more)
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    task.write_text("{}\n")
    assert "ships.jsonl" in fails("eval", tmp_path / "none", "--tasks", task, *more)


def test_retrieval_by_length_and_depth(kvcompress, any_form, text):
    options = ("--retrieval", "--lengths", "700,900", "--depths", "0,0.5", "--prompts", "1", "--text", text)
    document = json.loads(kvcompress("eval", any_form, *options, "--json").stdout)
    assert set(document) == {"cells", "found", "logprob", "keep", "protocol"}
    assert [(c["kind"], c["length"], c["depth"]) for c in document["cells"]][:3] == [
        ("passkey", 700, 0),
        ("passkey", 700, 0.5),
        ("passkey", 900, 0),
    ]
    assert document["protocol"]["lengths"] == [700, 900]
    table = kvcompress("eval", any_form, *options)
    assert table.code == 0 and "passkey" in table.stdout and "multikey" in table.stdout and "0% / 0%" in table.stdout


def test_retrieval_needs_no_text(kvcompress, compressed):
    options = ("--retrieval", "--lengths", "700", "--depths", "0.5", "--prompts", "1", "--json")
    document = json.loads(kvcompress("eval", compressed(), *options).stdout)
    assert document["protocol"]["text"] == "builtin:prose"


def test_perplexity_by_position(kvcompress, any_form, text):
    options = ("--by-position", "--text", text, "--seq-len", "200", "--max-windows", "2")
    document = json.loads(kvcompress("eval", any_form, *options, "--json").stdout)
    assert len(document["quarters"]) == 4 and document["quarters"][-1]["stop"] == 199
    assert document["last_over_first"] > 0
    table = kvcompress("eval", any_form, *options)
    assert "149 to 198" in table.stdout and "128 to 198" in table.stdout and "last quarter" in table.stdout


def test_positions_reach_to_the_end_of_the_models_context(kvcompress, compressed, tmp_path):
    (tmp_path / "long.txt").write_text("the sea was calm " * 800)
    outcome = kvcompress("eval", compressed(), "--by-position", "--text", tmp_path / "long.txt", "--json")
    assert json.loads(outcome.stdout)["protocol"]["seq_len"] == 2048


def test_greedy_continuations(kvcompress, any_form, text):
    options = ("--generation", "--text", text, "--prompts", "2", "--prompt-tokens", "40", "--new-tokens", "10")
    document = json.loads(kvcompress("eval", any_form, *options, "--json").stdout)
    assert len(document["prefixes"]) == 2 and 0 <= document["common_prefix"] <= 10
    assert "common prefix" in kvcompress("eval", any_form, *options).stdout


def test_what_is_asked_must_be_clear(fails, compressed, text):
    output = compressed()
    assert "nothing to evaluate on" in fails("eval", output)
    assert "Name a text with --text" in fails("eval", output, "--by-position")
    both = fails("eval", output, "--retrieval", "--generation")
    assert "--retrieval and --generation are two evaluations" in both
    assert "--lengths takes numbers" in fails("eval", output, "--retrieval", "--lengths", "1k")
    assert "reads at most 2048 tokens; 4096 were" in fails("eval", output, "--retrieval", "--lengths", "4096")
    assert "--recent does nothing with --generation" in fails("eval", output, "--generation", "--recent", "3")
    assert "--limit does nothing with --retrieval" in fails("eval", output, "--retrieval", "--limit", "3")
    lengths = fails("eval", output, "--text", text, "--lengths", "300")
    assert "--lengths does nothing with perplexity" in lengths
