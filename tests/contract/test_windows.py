"""Models whose every layer has a sliding window: the window is compressed, and what has left it is not held."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest import mock

import pytest
import torch

import kvcompress
from kvcompress.errors import OptionError
from kvcompress.model.model_spec import PARTS
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import BLOCK_TOKENS, PLAN_FILE, Plan
from kvcompress.runtime.attach import attachment_of
from kvcompress.site_plan import SitePlan
from tests.models.small import WINDOW, small_model
from tests.models.survey import assert_same, generated
from tests.tiny_models import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
RECENT = 16


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model = small_model("mistral", num_hidden_layers=2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    assert model.config.sliding_window == WINDOW
    return model


@pytest.fixture
def options(text_file: Path) -> CompressOptions:
    return CompressOptions(keep=0.25, calibration=(str(text_file),), tokens=512, seq_len=128, recent=RECENT)


@pytest.mark.parametrize("turn", [1, 64])
def test_the_tokens_of_the_models_own_cache_far_beyond_the_window(
    model: Any, options: CompressOptions, turn: int, tmp_path: Path
) -> None:
    own = generated(model, WINDOW + 80)
    with mock.patch.object(SitePlan, "exact", False):
        whole = replace(options, keep=1.0, ranks_only=True, policy="uniform", turn=turn)
        assert compress(tmp_path / "model", tmp_path / "out", whole, device="cpu").plan.window == WINDOW
        kvcompress.attach(model, tmp_path / "out")
        found = generated(model, WINDOW + 80)
    assert_same(own, found)
    for layer in found.past_key_values.layers:
        assert layer.n_dropped >= 96 and layer.n_encoded
        assert WINDOW - 1 <= layer.n_held < WINDOW - 1 + BLOCK_TOKENS
        assert layer.sink_keys.shape[2] == 0


@pytest.mark.parametrize("turn", [1, 64])
def test_bytes_are_the_claim_and_stop_to_grow(model: Any, options: CompressOptions, turn: int, tmp_path: Path) -> None:
    plan = compress(tmp_path / "model", tmp_path / "out", replace(options, turn=turn), device="cpu").plan
    kvcompress.attach(model, tmp_path / "out")
    ids = torch.randint(3, 300, (1, 400), generator=torch.Generator().manual_seed(3))
    cache, held = attachment_of(model).new_cache(), []
    with torch.no_grad():
        for i in range(0, 400, 8):
            model(input_ids=ids[:, i : i + 8], use_cache=True, past_key_values=cache)
            held.append(cache.nbytes() - cache.room_bytes())
            assert held[-1] == plan.cache_bytes(i + 8, exact_number_bytes=4), i
    assert cache.get_seq_length() == 400
    assert max(held[25:]) == max(held[35:]), "grows with the text"
    assert plan.original_bytes(400) == plan.original_bytes(WINDOW - 1) == plan.original_bytes_per_token * (WINDOW - 1)
    with pytest.raises(OptionError, match="cannot go back"):
        cache.crop(300)


def test_one_step_at_a_time_is_as_all_at_once(model: Any, options: CompressOptions, tmp_path: Path) -> None:
    compress(tmp_path / "model", tmp_path / "out", options, device="cpu")
    kvcompress.attach(model, tmp_path / "out")
    ids = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(5))
    logits = []
    for step in (1, 32):
        cache = attachment_of(model).new_cache()
        with torch.no_grad():
            parts = [
                model(input_ids=ids[:, i : i + step], use_cache=True, past_key_values=cache).logits
                for i in range(0, 200, step)
            ]
        logits.append(torch.cat(parts, 1)[0, -8:])
    assert (logits[0] - logits[1]).abs().max() < 0.2 * logits[0].std()  # blocks leave at other times, nothing else


def test_a_window_that_stays_exact_is_refused(model: Any, options: CompressOptions, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"every layer keeps a window of 64 tokens.*Lower --recent"):
        compress(tmp_path / "model", tmp_path / "out", replace(options, recent=40), device="cpu")


def test_the_plan_says_so_in_format_5(model: Any, options: CompressOptions, tmp_path: Path) -> None:
    compress(tmp_path / "model", tmp_path / "out", options, device="cpu")
    document = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert (document["format_version"], document["window"]) == (5, WINDOW)
    assert Plan.load(tmp_path / "out").window == WINDOW


def test_the_table_of_what_windows_gain_counts_as_plans_do() -> None:
    """recipes/window_gain.py, for the one model of it whose windows are compressed."""
    table = run_path(str(Path(__file__).parents[2] / "recipes" / "window_gain.py"))
    shape = table["Shape"]("all windows", 2, 0, WINDOW + 200, 512, 0)
    sites = tuple(
        SitePlan(layer, part, "latent", 256, ((2, 256),), 0.0, 256, False) for layer in range(2) for part in PARTS
    )
    plan = Plan("coded", "", "", "llama", "bfloat16", sites, 0, 64, {}, {}, True, 0, 0, window=WINDOW + 200)
    for n_tokens in (100, 300, 2000):
        _, share = table["shares"](shape, n_tokens)
        positions = 4 * (n_tokens - plan.n_dropped(n_tokens))
        gains = (plan.n_encoded(n_tokens) - plan.n_dropped(n_tokens)) * 4 * 4 // 8
        ours = plan.cache_bytes(n_tokens) - positions - gains
        assert share == pytest.approx(ours / plan.original_bytes(n_tokens))
