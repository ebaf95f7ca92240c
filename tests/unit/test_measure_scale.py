"""The recipe that measures scale: what it imagines of a shape is what it makes, and a chart has what was measured."""

from __future__ import annotations

import json
import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from kvcompress.calibration.memory import least_bytes, least_of, whole_bytes
from kvcompress.checkpoint.reader import open_checkpoint

RECIPE = Path(__file__).parents[2] / "recipes" / "scale_models.py"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE), run_name="recipe")


def test_what_is_counted_of_a_shape_is_that_of_its_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    shape = recipe["SHAPES"]["tiny"]
    recipe["make"](shape, tmp_path / "model", tmp_path, "cpu")
    with open_checkpoint(tmp_path / "model") as made:
        imagined = recipe["imagined"](shape)
        assert imagined.tensors == made.tensors
        for count in (whole_bytes, least_bytes):
            assert count(imagined, "bfloat16", 2048) == count(made, "bfloat16", 2048)


def test_a_gpu_is_asked_for_more_than_what_is_allocated(recipe: dict[str, Any]) -> None:
    """The table of docs/scale.md: Llama-3-8B in 5.9 GB of a GPU, 4.6 GB of which are its own."""
    shape = recipe["imagined"](recipe["SHAPES"]["8b"])
    asked = [round(least_of(shape, "bfloat16", 2048, device) / 1e9, 1) for device in ("cpu", "cuda")]
    assert asked == [4.6, 5.9]


def test_the_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert")
    monkeypatch.syspath_prepend(RECIPE.parent)
    draw = runpy.run_path(str(RECIPE.with_name("draw_scale.py")), run_name="recipe")["draw"]
    row = {"size": "8b", "way": "6GB", "streamed": True, "parameters": 8e9, "calibration_seconds": 77.0}
    rows = [row | {"allocated_bytes": 4.5e9}, row | {"parameters": 1e9, "streamed": False}]
    (tmp_path / "scale.json").write_text(json.dumps(rows))
    draw(Namespace(files=[tmp_path / "scale.json"], out=tmp_path, seq_len=2048))
    for name in ("light", "dark"):
        drawn = (tmp_path / f"scale-{name}.svg").read_text()
        assert drawn.startswith("<svg") and "calibration, seconds" in drawn and "streamed" in drawn
