"""Models of images and text: the text decoder is compressed, images go in as always."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

import kvcompress
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import SitePlan
from tests.models.survey import assert_same
from tests.tiny_models import build_tokenizer

IMAGE, START = 310, 312
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}


def small_vision_model() -> Any:
    text = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    text |= {"rope_parameters": _ROPE, "initializer_range": 0.3}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def generated(model: Any) -> Any:
    """Return greedy tokens and logits after text, an image of 16 patches, and text."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 300, (1, 40), generator=generator)
    ids = torch.cat([words[:, :20], torch.tensor([[START, *[IMAGE] * 4]]), words[:, 20:]], 1)
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    image["mm_token_type_ids"] = (ids == IMAGE).int()
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, **image, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.filterwarnings("ignore")
def test_a_text_decoder_with_images(tmp_path: Path, text_file: Path) -> None:
    model = small_vision_model()
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    own = generated(model)
    small = {"calibration": (str(text_file),), "tokens": 384, "seq_len": 96, "recent": 8}
    whole = CompressOptions(keep=1.0, ranks_only=True, policy="uniform", **small)
    with mock.patch.object(SitePlan, "exact", False):
        plan = compress(tmp_path / "model", tmp_path / "out", whole, device="cpu").plan
        assert plan.rotations and all(s.rotation == 0 for s in plan.sites if s.part == "key")
        kvcompress.attach(model, tmp_path / "out")
        found = generated(model)
    assert found.past_key_values.layers[0].n_encoded >= 64  # the image among them
    assert_same(own, found)
