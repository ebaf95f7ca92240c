"""Attention over latents: against plain softmax in float64, and the simulation against real decoding."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress.runtime.attention as attention_module
import kvcompress.runtime.simulation as simulation_module
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.attention import tiled_attention
from kvcompress.runtime.cache import CompressedLayer
from kvcompress.runtime.simulation import SimulatedCache, Simulation, simulated_attention
from tests.tiny_models import FAMILIES, PAD, random_ids


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    def make(family: str, **options: Any) -> Any:
        options = {"keep": 0.5, "sinks": 2, "recent": 1, "policy": "uniform", "ranks_only": True} | options
        return attach_plan(tiny_model(family), *tiny_plan(family, **options))

    return make


def decode_one_by_one(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [batch, n_tokens, vocabulary] of real decoding, one token at a time from the first."""
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


HONESTY = [(f, "latent", "latent") for f in FAMILIES if f not in ("llama-bf16", "llama-sharded", "llama-tied")]
HONESTY += [("phi3-partial", "frequency", "latent"), ("llama-mha", "share", "head"), ("qwen3", "band", "per_head")]


@pytest.mark.parametrize(
    ("family", "key_basis", "value_basis", "recent"),
    [(*case, i % 2) for i, case in enumerate(HONESTY)] + [(*HONESTY[0], 1), (*HONESTY[1], 0)],
)
def test_simulation_is_real_decoding(attached: Any, family: str, key_basis: str, value_basis: str, recent: int) -> None:
    """The honesty test: what `eval` reports is what generation does, at half of the rank."""
    model = attached(family, recent=recent, key_basis=key_basis, value_basis=value_basis)
    ids = random_ids(2, 75)
    real = decode_one_by_one(model, ids)
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=recent, block=BLOCK_TOKENS):
        simulated = model(ids, use_cache=False).logits
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
    assert (simulated - exact).abs().max() > 0.1  # compression at this rank is visible
    torch.testing.assert_close(simulated, real, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("recent", [0, 5, 40])
def test_simulation_never_flatters(attached: Any, recent: int) -> None:
    """Whole blocks leave the window, so generation sees at least the window that the simulation assumes."""
    model = attached("llama-gqa", recent=recent, sinks=0)
    plan = attachment_of(model).plan
    for n_tokens in range(200):
        assert n_tokens - plan.n_encoded(n_tokens) >= min(n_tokens, recent)


def test_simulation_with_a_window_as_long_as_the_text_is_exact(attached: Any) -> None:
    model = attached("llama-gqa")
    ids = random_ids(1, 40)
    exact = model(ids, use_cache=False).logits
    for sinks, recent in ((0, 40), (40, 0), (3, 1000)):
        with attachment_of(model).simulated(sinks=sinks, recent=recent):
            assert (model(ids, use_cache=False).logits - exact).abs().max() < 1e-4


def test_simulation_ends_with_its_block(attached: Any) -> None:
    model = attached("llama-gqa")
    ids = random_ids(1, 20)
    exact = model(ids, use_cache=False).logits
    with pytest.raises(RuntimeError, match="stop"), attachment_of(model).simulated(sinks=0, recent=0):
        raise RuntimeError("stop")
    assert torch.equal(model(ids, use_cache=False).logits, exact)


@pytest.mark.parametrize("family", ["mistral-sliding", "llama-gqa"])  # with a mask, and without
def test_simulation_in_slices_of_queries(attached: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(family)
    ids = random_ids(2, 40)
    results = []
    for n_queries in (1000, 7):
        monkeypatch.setattr(simulation_module, "_ON_A_CPU", n_queries)
        with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=3):
            results.append(model(ids, use_cache=False).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "phi3-partial", "smollm3"])
@pytest.mark.parametrize("recent", [0, 1])
def test_a_padded_row_says_what_it_says_alone(attached: Any, family: str, recent: int) -> None:
    """At half of the rank: sinks, positions and encoding of a row do not see its padding."""
    # Whole blocks of a batch are encoded together, so rows that differ by whole blocks are encoded alike.
    rows = [random_ids(1, n, seed=n)[0] for n in (7, 7 + 2 * BLOCK_TOKENS, 7 + BLOCK_TOKENS)]
    ids = torch.stack([torch.cat([torch.full((len(rows[1]) - len(r),), PAD), r]) for r in rows])
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": PAD}
    model = attached(family, recent=recent)
    together = model.generate(ids, attention_mask=(ids != PAD).long(), **options)
    for row, sequence in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(sequence[-40:], alone[0, -40:])


def filled_layer(model: Any, n_tokens: int) -> CompressedLayer:
    """Return the second layer of a cache that has seen n_tokens of two sequences."""
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        model(random_ids(2, n_tokens), past_key_values=cache)
    return cache.layers[1]


def visible_cache(layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """Return the keys and values that attention must see: [batch, kv heads, n_tokens, head_dim], float64."""
    n = layer.n_encoded
    rebuilt = layer.codecs.decode_keys(layer.codecs.unpack_keys(layer.packed_keys), layer.key_positions(0, n))
    keys = torch.cat([rebuilt, layer.keys], 2).double()
    values = torch.cat(
        [layer.codecs.decode_values(layer.codecs.unpack_values(layer.packed_values)), layer.values], 2
    ).double()
    for row, slots in enumerate(layer.tokens.sink_slots()):
        for i, slot in enumerate(slots.tolist()):
            if slot < n:
                keys[row, :, slot], values[row, :, slot] = layer.sink_keys[row, :, i], layer.sink_values[row, :, i]
    return keys, values


def oracle(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Plain softmax attention, float64; rows that see nothing give 0."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = query.double() @ keys.transpose(2, 3) * scaling + bias
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ values).transpose(1, 2)


def random_mask(n_queries: int, n_tokens: int) -> Tensor:
    """Return a bool mask [2, 1, n_queries, n_tokens] with holes, and one row that sees nothing."""
    mask = torch.rand(2, 1, n_queries, n_tokens, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[1, 0, 0] = False
    return mask


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_tiles_equal_plain_softmax(attached: Any, monkeypatch: pytest.MonkeyPatch, kind: str, sinks: int) -> None:
    layer = filled_layer(attached("llama-gqa", sinks=sinks, recent=4, key_basis="per_head"), 103)
    assert layer.n_encoded == 96
    keys, values = visible_cache(layer)
    for tile, n_queries in product((1, 2, 4096), (1, 3, 9)):  # few queries sum in the latent, many decode first
        monkeypatch.setattr(attention_module, "TILE_BLOCKS", tile)
        query = torch.randn(2, 4, n_queries, 8, generator=torch.Generator().manual_seed(0))
        bool_mask = random_mask(n_queries, 103)
        additive = torch.zeros(bool_mask.shape).masked_fill(~bool_mask, torch.finfo(torch.float32).min)
        mask = {"none": None, "bool": bool_mask, "additive": additive}[kind]
        bias = torch.zeros(1) if mask is None else torch.zeros(bool_mask.shape).masked_fill(~bool_mask, float("-inf"))
        expected = oracle(query, keys, values, bias.double(), 0.3)
        assert (tiled_attention(layer, query, mask, 0.3) - expected).abs().max() < 1e-5, (tile, n_queries)


@pytest.mark.parametrize("sinks", [1, 63, 64, 67, 80])
def test_sinks_on_either_side_of_the_encoded_tokens(attached: Any, sinks: int) -> None:
    """64 of 71 tokens are encoded; a sink among the recent ones counts once, and so does the last encoded one."""
    layer = filled_layer(attached("llama-gqa", sinks=sinks, recent=4), 71)
    query = torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    expected = oracle(query, *visible_cache(layer), torch.zeros(1, dtype=torch.float64), 0.3)
    assert (tiled_attention(layer, query, None, 0.3) - expected).abs().max() < 1e-5


def test_large_scores_do_not_overflow(attached: Any) -> None:
    layer = filled_layer(attached("llama-gqa", recent=4), 71)
    query = 1e4 * torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    expected = oracle(query, *visible_cache(layer), torch.zeros(1, dtype=torch.float64), 1.0)
    assert (tiled_attention(layer, query, None, 1.0) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama-bf16"])
def test_an_outlier_does_not_poison_the_others(attached: Any, family: str) -> None:
    """Latents of 16-bit checkpoints are float16: a token far outside the calibration must not become inf or NaN.

    Real models have such tokens: sinks whose keys and values are thousands of times larger than the others'.
    """
    model = attached(family, sinks=2, recent=1)
    layer = filled_layer(model, 31)
    huge = torch.full((2, 2, 1, 8), 1e7)
    layer.tokens.append(torch.full((2, 1), 31), 2)
    layer.update(huge, huge)
    layer.tokens.append(torch.full((2, 1), 32), 2)
    layer.update(huge / 1e7, huge / 1e7)
    layer.evict()
    assert layer.codecs.unpack_keys(layer.packed_keys).isfinite().all()
    assert layer.codecs.unpack_values(layer.packed_values).isfinite().all()
    mask = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    mask[..., 31] = False  # not even looked at
    assert tiled_attention(layer, torch.ones(2, 4, 1, 8), mask, 1.0).isfinite().all()
    simulated = SimulatedCache(attachment_of(model).codecs, Simulation(sinks=1, recent=0))
    simulated.begin(torch.arange(3)[None], 2, None)
    keys = torch.cat([huge, huge / 1e7, huge / 1e7], 2)  # the outlier is the sink, seen exactly
    assert simulated_attention(simulated.layers[1], torch.ones(2, 4, 3, 8), keys, keys, None, 1e-9).isfinite().all()
