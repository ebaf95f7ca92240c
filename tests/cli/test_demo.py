"""`kvcompress demo`, on the tiny model with everything made small."""

from __future__ import annotations

import contextlib
import json
import tempfile

import pytest

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress_cli import demo, inspect


@pytest.fixture
def small_demo(monkeypatch, model, tmp_path):
    """Puts the tiny model in the bundled one's place, and the temporary files where a test can look."""
    monkeypatch.setattr(demo, "bundled_model", lambda: contextlib.nullcontext(model))
    for name, value in {"_SEQ_LEN": 64, "_CALIBRATION_TOKENS": 256, "_EVAL_WINDOWS": 2, "_NEW_TOKENS": 80}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_json_has_every_step(kvcompress, small_demo):
    outcome = kvcompress("demo", "--keep", "0.25", "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert 0.24 < document["keep"] <= 0.25
    assert document["eval"]["protocol"]["windows"] == 2
    assert len(document["layers"]) == 4
    sample = document["sample"]
    assert sample["compressed"]["measured_bytes"] < sample["original"]["measured_bytes"]
    assert sample["original"]["measured_bytes"] == sample["original"]["original_bytes"]
    assert document["seconds"] > 0
    assert list(small_demo.iterdir()) == []


def test_for_people_it_shows_every_step_and_which_text_was_used(kvcompress, small_demo):
    outcome = kvcompress("demo")
    assert outcome.code == 0 and outcome.stderr == ""
    text = " ".join(outcome.stdout.split())
    for words in ("key rank", "perplexity, compressed", "before (", "after (", "evaluated on prose set aside"):
        assert words in text


def test_a_bad_keep_is_one_line(fails, small_demo):
    assert "keep must be above 0" in fails("demo", "--keep", "0")


def test_the_prose_to_evaluate_on_is_kept_apart(tmp_path):
    held_out, rest = (file.read_text() for file in demo.split_prose(tmp_path))
    assert len(held_out) >= 8 * 4 * 1024
    paragraphs = set(held_out.split("\n\n"))
    assert len(paragraphs) > 100
    assert not paragraphs & set(rest.split("\n\n"))


def test_the_bundled_model_is_there_and_can_be_compressed():
    with demo.bundled_model() as directory, open_checkpoint(directory) as checkpoint:
        assert checkpoint.spec.layers[0].n_kv_heads > 1
        assert inspect.form_obstacles(checkpoint.spec) == dict.fromkeys(("coded", "maps_only", "folded", "data_free"))
