"""The recipe that trains latent attention from several starts: each start is what its paper says, and it is trained."""

from __future__ import annotations

import json
import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress import compat
from kvcompress.heal.trainer import HealingTrainer
from tests.tiny_models import prose, random_ids

RECIPE = Path(__file__).parents[2] / "recipes" / "measure_latent.py"


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE), run_name="recipe")


@pytest.mark.parametrize(("start", "family"), [("mha2mla", "llama-gqa"), ("transmla", "llama-mqa")])
def test_a_conversion_that_keeps_all_of_rope_is_the_model_itself(
    recipe: dict[str, Any], tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, start: str, family: str
) -> None:
    """Of one head TransMLA turns all; MHA2MLA does where the share of pairs that it leaves is 1."""
    monkeypatch.setitem(recipe["mha2mla"].__globals__, "_ROPE_SHARE", 1)
    args = Namespace(device="cpu", keep=1.0, calibration_tokens=80, seq_len=40)
    model, layers = recipe["latents"](start, tiny_checkpoint(family), args, random_ids(2, 40))
    ids = random_ids(2, 40, seed=5)
    with torch.no_grad():
        exact = model(ids).logits
        compat.use_attention(model, "kvcompress_latent", recipe["latent_attention"])
        for decoder, layer in zip(model.model.layers, layers, strict=True):
            decoder.self_attn.__dict__["kvcompress_latent"] = layer
        torch.testing.assert_close(model(ids).logits, exact, rtol=2e-2, atol=2e-2)  # latents are 16-bit numbers
        layers[1].kept.zero_()
        assert float((model(ids).logits - exact).abs().max()) > 0.1


def test_every_start_is_trained(
    recipe: dict[str, Any],
    tiny_checkpoint: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, test = tmp_path / "prose.txt", tmp_path / "test.txt"
    text.write_text(prose(3000, seed=3), encoding="utf-8")
    test.write_text(prose(1000, seed=4), encoding="utf-8")
    score, chosen_by = HealingTrainer.score, set()
    monkeypatch.setattr(HealingTrainer, "score", lambda self, f: chosen_by.update(f) or score(self, f))
    sizes = {"tokens": 1536, "calibration-tokens": 256, "seq-len": 48, "batch": 4, "windows": 2, "keep": 0.5}
    few = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    starts = ("ours", "random", "mha2mla", "transmla")
    recipe["main"](
        [str(tiny_checkpoint("llama-gqa")), "--text", str(text), "--test", str(test), "--starts", *starts, *few]
    )
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["start"] for f in found] == list(starts) and set(starts) < set(recipe["STARTS"])
    assert all(f["tokens"] == 1536 and f["seconds"] > 0 and f["device"] == "cpu" for f in found)
    assert chosen_by == {str(text)}  # the best weights are no matter of what is tested
    before = {f["start"]: f["texts"]["test"]["before"]["kl_nats"] for f in found}
    assert before["ours"] < min(before[s] for s in starts[1:])
    assert all(f["texts"]["test"]["after"]["kl_nats"] < before[f["start"]] for f in found[1:])


@pytest.mark.parametrize(("n", "taken"), [(3, [0, 4, 9]), (1, [0]), (20, list(range(10)))])
def test_calibration_windows_come_from_all_texts(recipe: dict[str, Any], n: int, taken: list[int]) -> None:
    assert recipe["spread"](torch.arange(10)[:, None], n).flatten().tolist() == taken
