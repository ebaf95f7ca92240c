"""`kvcompress compress --max-ratio`."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from kvcompress.evaluate.perplexity import evaluate
from kvcompress.plan import Plan
from kvcompress_cli.loading import load_compressed
from tests.browser import needs_charts

SMALL = ("--tokens", "512", "--seq-len", "64", "--recent", "8")


@pytest.fixture(scope="module")
def searched(model, text, tmp_path_factory):
    """(what --json printed, the output) of a search on the calibration text's own windows and on a second text."""
    from kvcompress_cli.app import app

    directory = tmp_path_factory.mktemp("searched")
    second = directory / "second.txt"
    second.write_text(text.read_text()[::-1])
    asked = ["compress", str(model), str(directory / "out"), "--max-ratio", "1.02", "--calibration", str(text)]
    printed = directory / "printed"
    from contextlib import redirect_stdout

    with printed.open("w") as file, redirect_stdout(file), pytest.raises(SystemExit) as end:
        app([*asked, "--text", str(second), *SMALL, "--json"])
    assert not end.value.code
    return json.loads(printed.read_text()), directory / "out"


def test_the_smallest_keep_that_was_enough_is_chosen(searched, text):
    document, output = searched
    search = document["search"]
    enough = [s["keep"] for s in search["steps"] if s["enough"]]
    short = [s["keep"] for s in search["steps"] if not s["enough"]]
    assert search["keep"] == min(enough) and (not short or max(short) < search["keep"])
    assert {str(text)} < set(search["steps"][0]["ratios"]) and len(search["steps"][0]["ratios"]) == 2
    for step in search["steps"]:
        assert step["worst"] == max(ratio + step["errors"][kind] for kind, ratio in step["ratios"].items())
        assert min(step["errors"].values()) > 0
    assert Plan.load(output).keep <= search["keep"] < 1
    assert document["keep"] == Plan.load(output).keep


def test_the_ratios_are_those_that_eval_measures(searched, tmp_path):
    document, output = searched
    search = document["search"]
    (second,) = (kind for kind in search["steps"][0]["ratios"] if kind.endswith("second.txt"))
    chosen = next(s for s in search["steps"] if s["keep"] == search["keep"])
    loaded = load_compressed(output, base=None, device="cpu", dtype="auto")
    again = evaluate(loaded.model, loaded.tokenizer, second, seq_len=64, max_windows=search["windows"])
    assert again.perplexity["ratio"] == pytest.approx(chosen["ratios"][second], rel=1e-5)


@needs_charts
def test_the_report_shows_the_curve(searched, kvcompress, tmp_path):
    document, output = searched
    outcome = kvcompress("report", output)
    words = " ".join(outcome.stdout.split())
    assert outcome.code == 0 and "at most 1.02" in words and "chosen" in words
    assert f"{document['search']['keep']:.4f}" in words
    page = tmp_path / "page.html"
    assert kvcompress("report", output, "--html", page).code == 0
    assert "How small may it be?" in page.read_text()


def test_a_second_search_needs_no_calibration(searched, kvcompress, model, text, monkeypatch):
    """The moments are taken from beside the output."""
    from kvcompress.calibration import measured

    monkeypatch.setattr(measured, "collect_moments", lambda *_, **__: pytest.fail("calibrated again"))
    output = searched[1].parent / "other"
    outcome = kvcompress("compress", model, output, "--max-ratio", "1.5", "--calibration", text, *SMALL)
    assert outcome.code == 0 and "at most 1.5" in " ".join(outcome.stdout.split())
    assert Plan.load(output).keep <= Plan.load(searched[1]).keep


def test_what_makes_no_sense_is_refused(fails, model, text, tmp_path):
    def refused(*flags):
        return fails("compress", model, tmp_path / "out", "--calibration", text, *SMALL, *flags)

    assert "Leave out --keep" in refused("--max-ratio", "1.01", "--keep", "0.5")
    assert "must be above 1" in refused("--max-ratio", "0.99")
    assert "--text is what --max-ratio measures on" in refused("--text", text)
    assert "Leave out --folded" in refused("--max-ratio", "1.1", "--folded")
    assert "text missing.txt does not exist" in refused("--max-ratio", "1.1", "--text", "missing.txt")
    assert not list(tmp_path.iterdir())  # nothing was calibrated for it
    assert "has no window of 64 tokens left" in fails(
        "compress", model, tmp_path / "out", "--max-ratio", "1.1", "--calibration", _short(tmp_path, model), *SMALL
    )


def _short(directory, model):
    """A text that the calibration uses up: 512 tokens and a few."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("the sea was calm " * 150)["input_ids"][:520]
    file = directory / "short.txt"
    file.write_text(tokenizer.decode(ids))
    return file
