"""Every recipe runs on the bundled model and does what its comments say."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

import kvcompress
from kvcompress.heal.options import load_heal_recipe
from kvcompress.options import CompressOptions, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
FOLDED_START = Path(__file__).parents[2] / "recipes" / "mea-full-folded.toml"
DEMO = Path(str(files("kvcompress") / "assets" / "demo"))


def test_the_recipes_are_there() -> None:
    assert [r.stem for r in RECIPES] == [
        "default",
        "folded-half",
        "kvtc",
        "mea-deep-folded",
        "mea-full-folded",
        "mea-half-folded",
        "mea-half",
        "palu",
    ]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all outputs, so that they share what was measured on the text."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe(recipe: Path, outputs: Path) -> None:
    options = load_recipe(recipe, tokens=1024, seq_len=256, calibration=("builtin:prose",))
    result = kvcompress.compress(DEMO, outputs / recipe.stem, options)
    assert options.keep - 0.13 < result.plan.keep <= options.keep
    whole = {s.layer for s in result.plan.sites if s.exact}
    if recipe.stem == "mea-half":
        assert whole == {0, 4, 5}
        assert all(s.rank == s.width // 2 for s in result.plan.sites if s.layer not in whole)
    if recipe.stem == "palu":
        assert {s.rank for s in result.plan.sites} == {128}
    model = kvcompress.load(outputs / recipe.stem, dtype=torch.float32)
    ids = torch.arange(1, 41)[None]
    assert model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).shape == (1, 45)
    if recipe.stem == "folded-half":
        values = [layer.self_attn.v_proj.out_features for layer in model.model.layers]
        assert sum(values) < 6 * 256 and all(v % 32 == 0 for v in values)


HEALING = sorted((Path(__file__).parents[2] / "recipes" / "heal").glob("*.toml"))


@pytest.mark.parametrize("recipe", HEALING, ids=lambda r: r.stem)
def test_recipe_of_a_training(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is run on what its first lines compress: a coded output for maps, a folded one for the others."""
    coded = recipe.stem == "maps"
    options = CompressOptions(keep=0.0625, metric="weights") if coded else load_recipe(FOLDED_START)
    kvcompress.compress(DEMO, tmp_path / "out", options)
    short = {"tokens": 512, "seq_len": 128, "batch": 2, "held_out": 1, "evaluations": 1}
    chosen = load_heal_recipe(recipe, **short, text=("builtin:prose",))
    result = kvcompress.heal(tmp_path / "out", tmp_path / "healed", chosen, device="cpu")
    trained = {"maps": "maps", "mea-recovery": "attention", "folded": "attention"}
    assert result.stage["train"] == trained.get(recipe.stem, "all")
    assert "missing keys" not in caplog.text  # what was not trained is in no checkpoint, of which nobody need hear
    assert result.stage["tokens"] == 512
    kvcompress.load(tmp_path / "healed", dtype=torch.float32)
