"""Models of images and text: the text decoder is compressed, images go in through the processor as always."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import kvcompress
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import attachment_of
from kvcompress.site_plan import SitePlan
from tests.models.survey import assert_same
from tests.models.vision import MODELS
from tests.tiny_models import build_tokenizer


def generated(model: Any, given: dict[str, Any]) -> Any:
    """Return greedy tokens and logits after what a processor made of text, a picture and text."""
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_text_decoder_with_images(name: str, tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("PIL")
    try:
        model, given = MODELS[name]()
    except ImportError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    n_prompt = given["input_ids"].shape[1]
    own = generated(model, given)
    blind = generated(model, {k: v for k, v in given.items() if k in ("input_ids", "attention_mask")})
    assert not torch.equal(own.logits[0], blind.logits[0]), "the picture changes nothing"
    small = {"calibration": (str(text_file),), "tokens": 384, "seq_len": 96, "recent": 8}
    whole = CompressOptions(keep=1.0, ranks_only=True, policy="uniform", **small)
    with mock.patch.object(SitePlan, "exact", False):
        plan = compress(tmp_path / "model", tmp_path / "out", whole, device="cpu").plan
        assert plan.rotations and all(s.rotation is not None for s in plan.sites if s.part == "key")
        kvcompress.attach(model, tmp_path / "out")
        found = generated(model, given)
    place = attachment_of(model).places.layers[0]
    assert found.past_key_values.layers[place].n_encoded >= n_prompt // 32 * 32  # the picture among them
    assert_same(own, found)
