"""`kvcompress eval`, on every form of output."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from kvcompress.evaluations import EVALUATIONS_FILE
from kvcompress.plan import PLAN_FILE, Plan
from tests.cli.conftest import FOLDED

WINDOWS = ("--seq-len", "64", "--max-windows", "2")


def run(kvcompress, output, text, *flags):
    outcome = kvcompress("eval", output, "--text", text, *WINDOWS, *flags, "--json")
    assert outcome.code == 0 and outcome.stderr == ""
    return json.loads(outcome.stdout)


def test_json_is_the_promised_object(kvcompress, any_form, text):
    document = run(kvcompress, any_form, text)
    figures = {"perplexity", "ratio_standard_error", "kl_nats", "top1_agreement", "keep", "protocol"}
    assert set(document) - {"distance"} == figures
    assert ("distance" in document) == (Plan.load(any_form).form == "coded")
    assert set(document["perplexity"]) == {"original", "compressed", "ratio"}
    fields = {"text", "text_sha256", "seq_len", "windows", "sinks", "recent", "dtype"}
    assert set(document["protocol"]) == fields
    assert document["protocol"]["seq_len"] == 64 and document["protocol"]["windows"] == 2
    assert document["protocol"]["dtype"] == "float32"
    assert document["keep"] == 0.5
    assert document["kl_nats"] > 1e-4
    assert 0 < document["top1_agreement"] < 1


def test_all_forms_have_the_same_original(kvcompress, compressed, text):
    coded = run(kvcompress, compressed(), text)
    folded = run(kvcompress, compressed(**FOLDED), text)
    maps_only = run(kvcompress, compressed(maps_only=True), text)
    assert folded["perplexity"]["original"] == pytest.approx(coded["perplexity"]["original"], rel=1e-5)
    assert maps_only["perplexity"] == pytest.approx(coded["perplexity"], rel=1e-5)


def test_the_window_can_be_chosen(kvcompress, compressed, text):
    small = run(kvcompress, compressed(), text, "--recent", "0", "--sinks", "0")
    assert (small["protocol"]["recent"], small["protocol"]["sinks"]) == (0, 0)
    whole = run(kvcompress, compressed(), text, "--recent", "64")
    assert whole["perplexity"]["ratio"] == pytest.approx(1, abs=1e-5)
    assert whole["kl_nats"] < 1e-5 < small["kl_nats"]


def test_the_dtype_can_be_chosen(kvcompress, compressed, text):
    assert run(kvcompress, compressed(), text, "--dtype", "bfloat16")["protocol"]["dtype"] == "bfloat16"


def test_the_table_states_the_protocol(kvcompress, compressed, text):
    outcome = kvcompress("eval", compressed(), "--text", text, *WINDOWS)
    assert outcome.code == 0
    assert "ratio" in outcome.stdout
    assert "2 windows of 64" in " ".join(outcome.stdout.split())


def test_a_far_text_is_warned_of(kvcompress, compressed, text, tmp_path):
    """The same text twice: with the plan as it is, and with one whose calibration text was far smaller."""
    output = shutil.copytree(compressed(), tmp_path / "copy")
    assert kvcompress("eval", output, "--text", text, *WINDOWS).stderr == ""
    plan = json.loads((output / PLAN_FILE).read_text())
    plan["calibration"]["typical"]["component_energy"] /= 5
    (output / PLAN_FILE).write_text(json.dumps(plan))
    outcome = kvcompress("eval", output, "--text", text, *WINDOWS)
    assert "note: this text is far from" in outcome.stderr and "--calibration FILE" in outcome.stderr
    assert "of gains are at the ends" in " ".join(outcome.stdout.split())


@pytest.mark.parametrize("form", [{"maps_only": True}, FOLDED])
def test_the_original_may_have_moved(kvcompress, fails, compressed, model, text, tmp_path, form):
    output = shutil.copytree(compressed(**form), tmp_path / "moved")
    plan = json.loads((output / PLAN_FILE).read_text())
    plan["source"] = "/nowhere/at/all"
    (output / PLAN_FILE).write_text(json.dumps(plan))
    line = fails("eval", output, "--text", text, *WINDOWS)
    assert "/nowhere/at/all is not here" in line and "--base" in line
    assert run(kvcompress, output, text, "--base", model)["keep"] == 0.5


def test_another_model_is_no_original(fails, compressed, model, text, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    line = fails("eval", compressed(maps_only=True), "--text", text, *WINDOWS, "--base", other)
    assert "its fingerprint differs" in line


def test_failures_are_one_line(fails, compressed, text, tmp_path):
    assert "is not an output of kvcompress compress" in fails("eval", tmp_path, "--text", text)
    assert "nowhere is no directory" in fails("eval", "nowhere", "--text", text)
    assert "missing.txt does not exist" in fails("eval", compressed(), "--text", "missing.txt")
    assert "too little text" in fails("eval", compressed(), "--text", text, "--seq-len", "100000")
    assert "dtype 'int4' is unknown" in fails("eval", compressed(), "--text", text, "--dtype", "int4")


def test_a_missing_tokenizer_is_one_line(fails, compressed, text, tmp_path):
    output = shutil.copytree(compressed(), tmp_path / "copy")
    for file in output.glob("tokenizer*"):
        file.unlink()
    assert "has no usable tokenizer" in fails("eval", output, "--text", text, *WINDOWS)


def test_the_figures_are_kept_in_the_output(kvcompress, compressed, text, tmp_path):
    output = shutil.copytree(compressed(), tmp_path / "copy")
    (output / EVALUATIONS_FILE).unlink(missing_ok=True)
    first = run(kvcompress, output, text)
    other = run(kvcompress, output, text, "--recent", "0")
    assert run(kvcompress, output, text) == first
    records = json.loads((output / EVALUATIONS_FILE).read_text())["evaluations"]
    assert [{k: r[k] for k in first} for r in records] == [first, other]
    assert all(r["kind"] == "perplexity" for r in records)
    card = (output / "README.md").read_text()
    assert f"**{first['perplexity']['ratio']:.4f}**" in card and f"**{other['perplexity']['ratio']:.4f}**" in card
    assert not list(output.glob(".*"))


def test_an_output_that_cannot_be_written_is_measured_all_the_same(kvcompress, compressed, text, tmp_path, monkeypatch):
    output = shutil.copytree(compressed(), tmp_path / "copy")
    (output / EVALUATIONS_FILE).unlink(missing_ok=True)
    before = {p.name: p.read_bytes() for p in output.iterdir()}

    def read_only(self, *_args, **_settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    outcome = kvcompress("eval", output, "--text", text, *WINDOWS, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.stdout)["keep"] == 0.5
    assert outcome.stderr.startswith("note: not recorded") and outcome.stderr.count("\n") == 1
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def test_a_peer_on_an_uncompressed_model(kvcompress, model, text):
    outcome = kvcompress(
        "eval", model, "--cache", "kivi-2bit", "--text", text, *WINDOWS, "--recent", "16", "--seq-len", "128", "--json"
    )
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert document["keep"] == (2 + 32 / 32) / 16
    protocol = document["protocol"]
    assert (protocol["recent"], protocol["sinks"], protocol["seq_len"]) == (16, 0, 128)
    # 4 layers, keys and values of 32 numbers in bf16; of 128 tokens 96 have left the window of 16 in whole groups
    assert protocol["cache"]["bytes_per_token"] == 4 * 2 * 32 * 3 / 8
    assert protocol["cache"]["bytes_at_seq_len"] == 96 * 96 + 32 * 4 * 2 * 32 * 2
    assert document["kl_nats"] > 1e-4


def test_a_peer_in_words(kvcompress, model, text):
    outcome = kvcompress("eval", model, "--cache", "fp8", "--text", text, *WINDOWS)
    assert outcome.code == 0
    assert "fp8, stored in bfloat16" in outcome.stdout and "256 beyond the window" in outcome.stdout


def test_peers_that_cannot_be_measured(fails, model, text):
    assert "cache 'int3' is unknown. Choose from hqq-4bit" in fails("eval", model, "--cache", "int3", "--text", text)
    assert "--sinks does nothing with --cache" in fails("eval", model, "--cache", "fp8", "--text", text, "--sinks", "4")
    assert "hardly leave the exact window" in fails("eval", model, "--cache", "kivi-2bit", "--text", text, *WINDOWS)


def test_the_names_in_the_help_are_all_peers():
    from kvcompress.evaluate.peers import PEERS
    from kvcompress_cli.eval_peers import NAMES

    assert NAMES.split(", ") == list(PEERS)
