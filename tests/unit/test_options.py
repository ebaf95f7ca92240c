"""Options and recipes: what makes no sense is refused at once, with the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import OptionError
from kvcompress.options import CompressOptions, load_recipe, with_overrides


def test_defaults_are_those_of_the_design() -> None:
    options = CompressOptions()
    assert (options.keep, options.key_basis, options.value_basis, options.policy) == (0.25, "latent", "latent", "loss")
    assert (options.sinks, options.recent, options.tokens, options.seq_len) == (4, 64, 65536, 2048)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"keep": -0.5}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"keep": "half"}, "keep"),
        ({"key_basis": "palu"}, "key_basis"),
        ({"value_basis": "frequency"}, "value_basis"),
        ({"policy": "greedy"}, "policy"),
        ({"metric": "hessian"}, "metric"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 10.5}, "tokens"),
        ({"seq_len": 8}, "seq_len"),
        ({"sinks": -1}, "sinks"),
        ({"recent": -1}, "recent"),
        ({"band": 1}, "band"),
        ({"seed": -1}, "seed"),
        ({"turn": 0}, "turn must be 1 or a power of two"),
        ({"turn": 16}, "turn must be 1 or a power of two"),
        ({"turn": 96}, "turn must be 1 or a power of two"),
        ({"turn": 64.0}, "turn must be 1 or a power of two"),
        ({"turn": True}, "turn must be 1 or a power of two"),
        ({"turn": 64, "key_basis": "frequency"}, "turn 64 is for keys that are un-rotated"),
        ({"turn": 64, "key_basis": "head", "ranks_only": True}, "key basis 'head'"),
        ({"turn": 64, "key_basis": "grouped", "folded": True}, "key basis 'grouped'"),
        ({"group": 0}, "group"),
        ({"group": -2}, "group"),
        ({"group": "two"}, "group"),
        ({"policy": "middle", "layers": "third"}, "layers"),
        ({"policy": "middle", "layers": 5}, "layers"),
        ({"seq_len": 16, "sinks": 16}, "sinks"),
    ],
    ids=str,
)
def test_nonsense_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(OptionError, match=field) as error:
        CompressOptions(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [1, 1.0, 0.001])
def test_edges_of_keep(keep: float) -> None:
    assert CompressOptions(keep=keep).keep == keep


@pytest.mark.parametrize("key_basis", ["band", "per_head", "latent"])
@pytest.mark.parametrize("turn", [1, 32, 64, 1024])
def test_turns_of_bases_that_do_not_commute(key_basis: str, turn: int) -> None:
    assert CompressOptions(key_basis=key_basis, turn=turn).turn == turn


def test_options_are_json() -> None:
    options = CompressOptions(keep=0.25, calibration=("a.txt", "b.txt"))
    document = json.loads(json.dumps(options.to_json()))
    assert CompressOptions(**document | {"calibration": tuple(document["calibration"])}) == options


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "r.toml"
    file.write_text(text)
    return file


def test_a_recipe_sets_options(tmp_path: Path) -> None:
    file = recipe(tmp_path, 'keep = 0.25\nkey_basis = "band"\nband = 8\nturn = 64\ncalibration = ["a.txt", "b.txt"]\n')
    expected = CompressOptions(keep=0.25, key_basis="band", band=8, turn=64, calibration=("a.txt", "b.txt"))
    assert load_recipe(file) == expected


def test_overrides_win_and_none_does_not(tmp_path: Path) -> None:
    file = recipe(tmp_path, "keep = 0.25\nsinks = 8\n")
    options = load_recipe(file, keep=0.75, sinks=None, recent=0)
    assert (options.keep, options.sinks, options.recent) == (0.75, 8, 0)
    assert with_overrides(options, keep=None) == options


def test_overrides_are_checked(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="keep"):
        load_recipe(recipe(tmp_path, "keep = 0.25"), keep=2.0)


def test_one_calibration_text_needs_no_list(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, 'calibration = "a.txt"')).calibration == ("a.txt",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("keep = ", "not valid TOML"),
        ("keeep = 0.5", "unknown key 'keeep'. Known keys: band, calibration"),
        ("keep = 0.0", "keep must be above 0"),
        ("keep = true\nrecent = true", "keep|recent"),
        ('sinks = "four"', "sinks must be a whole number"),
        ("[group]\nheads = 4", "group"),
        ("calibration = [1, 2]", "calibration"),
        ('folded = "yes"', "folded"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason) as error:
        load_recipe(recipe(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")


def test_a_binary_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="not valid TOML"):
        load_recipe(tmp_path / "r.toml")
