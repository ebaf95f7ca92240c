"""`kvcompress compress`: options, output and failures."""

from __future__ import annotations

import json

import pytest
import torch

from kvcompress.options import CompressOptions
from kvcompress.plan import Plan
from kvcompress_cli.compress import choose_options

SMALL = ("--tokens", "256", "--seq-len", "64", "--recent", "8")


def test_json_is_the_promised_object(kvcompress, model, text, tmp_path):
    output = tmp_path / "out"
    outcome = kvcompress(
        "compress", model, output, "--calibration", text, *SMALL, "--keep", "0.5", "--ranks-only", "--json"
    )
    assert outcome.code == 0 and outcome.stderr == ""
    document = json.loads(outcome.stdout)
    assert set(document) == {"keep", "bytes_per_token", "predicted_loss_nats", "layers", "seconds", "output"}
    assert document["keep"] == 0.5
    assert document["bytes_per_token"] == {"original": 512, "compressed": 256}
    assert document["predicted_loss_nats"] > 0
    assert document["output"] == str(output)
    ranks = [layer[part]["rank"] for layer in document["layers"] for part in ("key", "value")]
    assert sum(ranks) * 2 == 256
    assert all(layer[part]["width"] == 32 for layer in document["layers"] for part in ("key", "value"))
    assert Plan.load(output).keep == 0.5


def test_the_summary_says_what_to_do_next(kvcompress, model, text, tmp_path):
    outcome = kvcompress(
        "compress", model, tmp_path / "out", "--calibration", text, *SMALL, "--keep", "0.5", "--ranks-only"
    )
    assert outcome.code == 0 and outcome.stderr == ""
    assert "256 of 512" in outcome.stdout
    for command in ("report", "eval", "generate"):
        assert f"kvcompress {command} {tmp_path / 'out'}" in outcome.stdout


def test_progress_goes_to_a_terminal_and_never_to_stdout(kvcompress, model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    outcome = kvcompress("compress", model, tmp_path / "out", "--calibration", text, *SMALL, "--keep", "0.5", "--json")
    assert "calibrating" in outcome.stderr and "of 256 tokens" in outcome.stderr
    assert 0.49 < json.loads(outcome.stdout)["keep"] <= 0.5


def test_no_calibration_has_no_nats(kvcompress, model, tmp_path):
    outcome = kvcompress("compress", model, tmp_path / "out", "--no-calibration", "--json")
    assert json.loads(outcome.stdout)["predicted_loss_nats"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # no moments


def test_maps_only_writes_no_weights(kvcompress, model, tmp_path):
    assert kvcompress("compress", model, tmp_path / "out", "--no-calibration", "--maps-only").code == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_folded_makes_smaller_weights(kvcompress, model, tmp_path):
    bases = ("--key-basis", "head", "--value-basis", "head")
    assert kvcompress("compress", model, tmp_path / "out", "--no-calibration", "--folded", *bases).code == 0
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < (model / "model.safetensors").stat().st_size


def test_turn_is_kept_in_the_plan(kvcompress, model, tmp_path):
    choices = ("--no-calibration", "--policy", "uniform", "--ranks-only", "--key-basis", "per_head", "--turn", "64")
    assert kvcompress("compress", model, tmp_path / "out", *choices).code == 0
    plan = Plan.load(tmp_path / "out")
    assert {s.turn for s in plan.sites if s.part == "key"} == {64} and plan.options["turn"] == 64


def test_force_replaces_the_output(kvcompress, fails, model, tmp_path):
    args = ("compress", model, tmp_path / "out", "--no-calibration")
    assert kvcompress(*args).code == 0
    assert "is not empty" in fails(*args)
    assert kvcompress(*args, "--force", "--keep", "0.25").code == 0
    assert Plan.load(tmp_path / "out").keep == 0.25


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'keep = 0.25\npolicy = "uniform"\ncalibration = ["a.txt"]\nmaps_only = true\nmetric = "activation"\n'
    )
    flags = {"keep": None, "policy": "energy", "maps_only": False, "tokens": None}
    options = choose_options(recipe, calibration=None, no_calibration=False, metric=None, **flags)
    chosen = {"keep": 0.25, "policy": "energy", "metric": "activation", "maps_only": False}
    assert options == CompressOptions(calibration=("a.txt",), **chosen)
    options = choose_options(recipe, calibration=("b.txt", "c.txt"), no_calibration=False, metric="fisher", **flags)
    assert options.calibration == ("b.txt", "c.txt") and options.metric == "fisher"
    options = choose_options(None, calibration=None, no_calibration=True, metric=None)
    assert options == CompressOptions(metric="weights")


def test_a_recipe_is_run_with_its_overrides(kvcompress, model, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('keep = 0.5\nmetric = "weights"\npolicy = "uniform"\nmaps_only = true\n')
    args = ("--recipe", recipe, "--keep", "0.75", "--no-maps-only")
    assert kvcompress("compress", model, tmp_path / "out", *args).code == 0
    plan = Plan.load(tmp_path / "out")
    assert plan.options["keep"] == 0.75 and plan.options["policy"] == "uniform"
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep", "0"], "keep must be above 0"),
        (["--keep", "1.5"], "keep must be above 0"),
        (["--key-basis", "magic"], "key_basis 'magic' is unknown"),
        (["--folded", "--key-basis", "latent"], "does not commute with RoPE"),
        (["--turn", "48"], "turn must be 1 or a power of two"),
        (["--turn", "64", "--key-basis", "frequency"], "leave out --turn"),
        (["--layers", "lots", "--policy", "middle", "--no-calibration"], "layers 'lots'"),
        (["--no-calibration", "--metric", "fisher"], "--no-calibration cannot"),
        (["--no-calibration", "--calibration", "t.txt"], "--calibration would do nothing"),
        (["--calibration", "missing.txt"], "missing.txt does not exist"),
        (["--recipe", "missing.toml"], "missing.toml does not exist"),
        (["--device", "abacus"], "device 'abacus' does not work here"),
        (["--dtype", "int4"], "dtype 'int4' is unknown"),
        (["--no-calibration", "--group", "3"], "groups of 3"),
    ],
)
def test_a_bad_choice_is_one_line_and_leaves_nothing(fails, model, tmp_path, flags, words):
    assert words in fails("compress", model, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_one_line_and_leaves_nothing(fails, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert "too little text" in fails("compress", model, tmp_path / "out", "--calibration", text, *SMALL)
    assert list(tmp_path.iterdir()) == [text]


def test_a_missing_model_is_one_line_and_leaves_nothing(fails, tmp_path):
    assert "neither a directory" in fails("compress", tmp_path / "no" / "model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_who_calibrates_is_asked_for_once(fails, model, tmp_path):
    assert "Give one of them" in fails("compress", model, tmp_path / "out", "--gpus", "all", "--ray", "auto")
    if not torch.cuda.is_available():
        assert "there is none here" in fails("compress", model, tmp_path / "out", "--gpus", "all")
    assert "for processes of --gpus" in fails("compress", model, tmp_path / "out", "--per-gpu", 2)
    on_a_cpu = ("--ray", "local", "--per-gpu", 2, "--device", "cpu")
    assert "the work is done on cpu" in fails("compress", model, tmp_path / "out", *on_a_cpu)
    assert not (tmp_path / "out").exists()


def test_memory_is_a_size_that_suffices(fails, model, text, tmp_path):
    asked = ("compress", model, tmp_path / "out", "--calibration", text, "--tokens", 64, "--seq-len", 32, "--memory")
    assert "is no size" in fails(*asked, "lots")
    assert "is too little for" in fails(*asked, "1kB")
    assert not (tmp_path / "out").exists()
