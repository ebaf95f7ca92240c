"""The seed paper's model in small: 48 layers of experts, 4 KV heads, through the recipes for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvcompress
from kvcompress.options import load_recipe
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import attachment_of
from tests.models.small import small_model
from tests.tiny_models import build_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes" / "qwen3-30b-a3b"
#: Which layers each recipe compresses, of 48.
LAYERS = {"half": range(12, 36), "deep": range(3, 48), "full": range(48)}
_SIZES = {"num_hidden_layers": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 4}


@pytest.mark.filterwarnings("ignore")
def test_half_deep_and_full(tmp_path: Path, text_file: Path) -> None:
    model = small_model("qwen3_moe", **_SIZES, hidden_size=32, head_dim=8, moe_intermediate_size=16)
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    ids = torch.arange(3, 63)[None]
    for name, expected in LAYERS.items():  # the moments of the first one are used by all
        options = load_recipe(RECIPES / f"{name}.toml", calibration=(str(text_file),), tokens=128, seq_len=64)
        plan = compress(tmp_path / "model", tmp_path / name, options, device="cpu").plan
        cut = [s for s in plan.sites if s.rank < s.width]
        assert {s.layer for s in cut} == set(expected) and len(cut) == 2 * len(expected)
        assert {s.rank // 8 for s in cut} == {2} and plan.keep == options.keep
        kvcompress.attach(model, tmp_path / name)
        cache = attachment_of(model).new_cache()
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, past_key_values=cache)
        assert cache.nbytes() - cache.room_bytes() == plan.cache_bytes(60, exact_number_bytes=4)
    assert len(list(tmp_path.glob("kvcompress-moments-*"))) == 1
