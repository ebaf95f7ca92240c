"""Index blocks, RoPE, and text sampled from the model."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from kvcompress.calibration import sampling
from kvcompress.calibration.drawing import drawn
from kvcompress.calibration.sampling import sample_windows
from kvcompress.errors import OptionError
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec, Projection
from kvcompress.model.rope import Rotary
from tests.tiny_models import BOS, build_tokenizer


def attention(n_kv_heads: int = 2, head_dim: int = 8, rotary_dim: int = 8) -> AttentionSpec:
    projection = Projection("w", None, "m", 0, n_kv_heads * head_dim)
    return AttentionSpec(5, n_kv_heads, n_kv_heads, head_dim, rotary_dim, projection, projection)


def test_head_groups() -> None:
    assert blocks.head_groups(attention(4, 2, 2), 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for n_heads in (0, 3, 8, -1):
        with pytest.raises(OptionError, match=f"layer 5: 4 KV heads cannot be split into groups of {n_heads}"):
            blocks.head_groups(attention(4, 2, 2), n_heads)


def test_channels() -> None:
    assert blocks.channels(attention(2, 4, 4)).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("rotary_dim", "pairs"),
    [
        (8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (4, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (0, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_channel_pairs(rotary_dim: int, pairs: list[list[int]]) -> None:
    assert blocks.channel_pairs(attention(rotary_dim=rotary_dim)).tolist() == pairs


def test_frequencies_hold_real_then_imaginary_numbers_of_all_heads() -> None:
    assert blocks.frequencies(attention(2, 4, 4)).tolist() == [[0, 4, 2, 6], [1, 5, 3, 7]]


def test_bands_hold_neighbouring_frequencies() -> None:
    assert blocks.bands(attention(1, 8, 8), 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for n_channels in (0, 1, 3, 6, 16):
        with pytest.raises(OptionError, match=f"layer 5: head_dim 8 cannot be split into bands of {n_channels}"):
            blocks.bands(attention(), n_channels)


ROTARY_FAMILIES = ["llama-gqa", "llama-yarn", "llama-llama3", "mistral", "qwen3", "phi3", "phi3-partial"]


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_rotary_is_the_models_own(tiny_model: Any, family: str) -> None:
    """Against transformers' own function, at far positions too; yarn scales as well."""
    model = tiny_model(family)
    head_dim = model.config.head_dim if family in ("qwen3", "mistral") else model.config.hidden_size // 4
    keys = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 7, 300, 500]])
    cos, sin = model.model.rotary_emb(keys, positions)
    _, expected = sys.modules[type(model).__module__].apply_rotary_pos_emb(keys, keys, cos, sin)
    rotary = Rotary.of(model)
    torch.testing.assert_close(rotary.rotate(keys, positions), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotary.unrotate(expected, positions), keys, rtol=1e-5, atol=1e-5)
    assert (rotary.scale != 1) == (family == "llama-yarn")


class TestSampling:
    def test_is_seeded_and_starts_with_the_start_token(self, tiny_model: Any) -> None:
        model, tokenizer = tiny_model("llama-gqa"), build_tokenizer()
        first, again, other = (sample_windows(model, tokenizer, 3, 12, seed=s) for s in (0, 0, 1))
        assert first.shape == (3, 12) and (first[:, 0] == BOS).all()
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert len({tuple(row) for row in first.tolist()}) == 3

    def test_follows_the_model(self, tiny_model: Any) -> None:
        """Second tokens are distributed as the model says after the start token."""
        model = tiny_model("llama-gqa")
        windows = sample_windows(model, build_tokenizer(), 800, 2, seed=0)
        with torch.no_grad():
            probability = model(torch.tensor([[BOS]])).logits[0, 0].softmax(-1)
        counts = torch.bincount(windows[:, 1], minlength=len(probability))
        top = probability.argsort(descending=True)[:5]
        deviation = (800 * probability * (1 - probability)).sqrt()
        assert ((counts - 800 * probability)[top].abs() < 4 * deviation[top]).all()

    def test_long_windows_are_made_of_short_sequences(self, tiny_model: Any) -> None:
        """Sampled side by side: 255 steps of the model for two windows of 600 tokens, each sequence from the start."""
        model, steps, done = tiny_model("llama-gqa"), [], []
        handle = model.register_forward_hook(lambda *_: steps.append(torch.backends.cuda.cudnn_sdp_enabled()))
        windows = sample_windows(model, build_tokenizer(), 2, 600, seed=0, progress=lambda *x: done.append(x))
        handle.remove()
        assert windows.shape == (2, 600) and len(steps) == 255
        assert not any(steps)  # cuDNN's attention would be planned anew at each
        assert (windows.flatten()[::256] == BOS).all()
        assert done[-1] == (1200, 1200) and done == sorted(done)

    def test_every_second_one_begins_anywhere(self, tiny_model: Any) -> None:
        model, tokenizer = tiny_model("llama-gqa"), build_tokenizer()
        first, again = (sample_windows(model, tokenizer, 40, 4, seed=0, batch=7, anywhere=True) for _ in range(2))
        assert torch.equal(first, again)
        batches = [rows[:, 0] for rows in first.split(7)]
        assert all((starts[::2] == BOS).all() for starts in batches)
        drawn = torch.cat([starts[1::2] for starts in batches])
        assert len(drawn.unique()) > len(drawn) // 2 and int(drawn.max()) < len(tokenizer)

    def test_uses_the_cache_correctly(self, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the likeliest token in place of a sample, the windows are the model's greedy continuation."""
        monkeypatch.setattr(sampling, "drawn", lambda p, generator: p.argmax(-1, keepdim=True))
        model = tiny_model("smollm3")
        window = sample_windows(model, build_tokenizer(), 1, 15, seed=0)
        model.generation_config.eos_token_id = None
        greedy = model.generate(torch.tensor([[BOS]]), max_new_tokens=14, do_sample=False)
        assert torch.equal(window, greedy)


class TestDrawing:
    def test_tokens_come_as_often_as_they_should(self) -> None:
        """4,000 draws of each row, within four standard deviations; what has no probability never comes."""
        probability = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0], [0.05, 0.0, 0.9, 0.0, 0.0, 0.05]])
        generator = torch.Generator().manual_seed(0)
        for row in probability:
            tokens = drawn(row.expand(4000, -1), generator)
            assert tokens.shape == (4000, 1)
            counts = torch.bincount(tokens[:, 0], minlength=6)
            assert not counts[row == 0].any()
            assert ((counts - 4000 * row).abs() <= 4 * (4000 * row * (1 - row)).sqrt()).all()

    def test_ends_are_within(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probability = torch.tensor([[0.0, 0.25, 0.75]])
        for number, token in ((0.0, 1), (0.24, 1), (0.26, 2), (1.0, 2)):
            monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: torch.tensor([[number]]))
            assert int(drawn(probability, torch.Generator())) == token
