"""Keys un-rotated by turns: the cache says what keys of their own positions say, and no key is rebuilt to be scored."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcompress.runtime.attention as attention_module
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.attention import tiled_attention
from kvcompress.runtime.cache import CompressedCache
from tests.coding import coded_plan
from tests.contract.test_runtime_attention import decode_one_by_one, filled_layer, oracle, random_mask, visible_cache
from tests.contract.test_runtime_cache import assert_caches_equal, fill
from tests.contract.test_runtime_full_rank import assert_same, both, generate, padded
from tests.tiny_models import PAD, random_ids

BASES = ["band", "per_head", "latent"]


@pytest.fixture
def planned(tiny_plan: Any) -> Any:
    """planned(family, **options): (plan, maps) of make_plan, in turns of 64 tokens unless told otherwise."""
    usual = {"keep": 0.5, "sinks": 2, "recent": 4, "band": 4, "turn": 64}
    return lambda family, **options: tiny_plan(family, **(usual | options))


@pytest.fixture
def attached(planned: Any, tiny_model: Any) -> Any:
    """attached(family, **options): a model whose cache keeps half of the rank, in numbers rather than bits."""

    def make(family: str, **options: Any) -> Any:
        return attach_plan(
            tiny_model(family), *planned(family, **({"policy": "uniform", "ranks_only": True} | options))
        )

    return make


@pytest.fixture
def at_full_rank(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, never_exact: None) -> Any:
    """at_full_rank(family, **coded_plan arguments): a model whose cache codes every site and loses nothing."""

    def make(family: str, **arguments: Any) -> Any:
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            plan, maps = coded_plan(checkpoint, tiny_moments(family), **({"turn": 64} | arguments))
        return attach_plan(tiny_model(family), plan, maps)

    return make


def test_the_plan_says_which_keys_have_turns(planned: Any) -> None:
    plan, _ = planned("smollm3", policy="uniform", ranks_only=True)
    turns = {(s.layer, s.part): s.turn for s in plan.sites}
    assert turns == {(i, part): 64 if part == "key" and i != 1 else 1 for i in range(3) for part in ("key", "value")}
    whole, _ = planned("llama-gqa", keep=1.0)
    assert all(s.exact and s.turn == 1 for s in whole.sites)


def test_a_plan_with_turns_is_read_back(planned: Any, tmp_path: Any) -> None:
    plan, _ = planned("llama-gqa", turn=128, policy="uniform", ranks_only=True)
    plan.save(tmp_path)
    assert [s.turn for s in Plan.load(tmp_path).sites] == [128, 1] * 3


def in_turn(*families: str) -> list[tuple[str, str, int]]:
    """Return every family with every basis, with turns of 32 and of 64 by turns."""
    return [(f, b, (32, 64)[(i + j) % 2]) for i, f in enumerate(families) for j, b in enumerate(BASES)]


@pytest.mark.parametrize(
    ("family", "key_basis", "turn"), in_turn("llama-gqa", "llama-yarn", "qwen2", "qwen3", "phi3-partial", "smollm3")
)
def test_full_rank_generates_what_the_whole_cache_does(
    at_full_rank: Any, family: str, key_basis: str, turn: int
) -> None:
    assert_same(*both(at_full_rank(family, key_basis=key_basis, turn=turn), random_ids(2, 101)))


@pytest.mark.parametrize("family", ["llama-gqa", "llama-yarn", "phi3-partial", "smollm3"])
@pytest.mark.parametrize("turn", [32, 128])
def test_left_padded_batch_at_full_rank(at_full_rank: Any, family: str, turn: int) -> None:
    """Turns begin inside the padding, and whole ones lie in it."""
    rows = [random_ids(1, n, seed=n)[0] for n in (9, 140, 61)]
    model = at_full_rank(family, turn=turn)
    ids, mask = padded(rows)
    coded = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(coded.sequences[i, -24:], generate(model, row[None]).sequences[0, -24:])
    detach(model)
    assert_same(coded, generate(model, ids, attention_mask=mask))


@pytest.mark.parametrize("family", ["llama-gqa", "phi3-partial"])
def test_beams_and_turns_of_talk_at_full_rank(at_full_rank: Any, family: str) -> None:
    model = at_full_rank(family)
    first = generate(model, random_ids(1, 75))
    prompt = torch.cat([first.sequences, random_ids(1, 9, seed=1)], 1)
    second = generate(model, prompt, past_key_values=first.past_key_values)
    beams = generate(model, prompt, num_beams=3)
    detach(model)
    assert_same(second, generate(model, prompt))
    assert torch.equal(beams.sequences, generate(model, prompt, num_beams=3).sequences)


@pytest.mark.parametrize(
    ("turn", "n_kept"),
    [(64, n) for n in (135, 128, 110, 96, 71, 64, 33, 5)] + [(t, n) for t in (32, 128) for n in (110, 64)],
)
def test_crop_inside_a_turn(at_full_rank: Any, n_kept: int, turn: int) -> None:
    model = at_full_rank("llama-gqa", turn=turn)
    ids, more = random_ids(2, 140), random_ids(2, 40, seed=1)
    cropped, _ = fill(model, ids, 130)
    cropped.crop(n_kept - 140)
    short, _ = fill(model, ids[:, :n_kept], n_kept)
    for token in more.split(1, 1):
        ours = model(token, past_key_values=cropped).logits
        theirs = model(token, past_key_values=short).logits
        torch.testing.assert_close(ours, theirs, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize(
    ("family", "key_basis", "turn"), in_turn("llama-gqa", "llama-yarn", "qwen2", "phi3-partial", "smollm3")
)
def test_simulation_is_real_decoding(attached: Any, family: str, key_basis: str, turn: int) -> None:
    """The honesty test: what `eval` reports is what generation does, absorbed queries and all."""
    model = attached(family, key_basis=key_basis, turn=turn)
    ids = random_ids(2, 110)
    real = decode_one_by_one(model, ids)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        with attachment_of(model).simulated(sinks=2, recent=4, block=BLOCK_TOKENS):
            simulated = model(ids, use_cache=False).logits
    assert (simulated - exact).abs().max() > 0.05
    torch.testing.assert_close(simulated, real, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("key_basis", BASES)
def test_simulation_is_real_decoding_with_bits(planned: Any, tiny_model: Any, key_basis: str) -> None:
    plan, maps = planned("qwen3", key_basis=key_basis, keep=0.125)
    assert any(s.quantised and s.turn == 64 for s in plan.sites)
    model = attach_plan(tiny_model("qwen3"), plan, maps)
    ids = random_ids(4, 110)
    real = decode_one_by_one(model, ids)
    with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=4, block=BLOCK_TOKENS):
        simulated = model(ids, use_cache=False).logits
    # A number at the edge of a cell may fall to either side, and all that follows in its row with it.
    assert int(((simulated - real).abs().amax((1, 2)) < 1e-3).sum()) >= 3


@pytest.mark.parametrize("key_basis", BASES)
@pytest.mark.parametrize("turn", [32, 64, 256])
def test_tiles_equal_plain_softmax(attached: Any, monkeypatch: pytest.MonkeyPatch, key_basis: str, turn: int) -> None:
    """Few queries are absorbed, once for each turn, many score rebuilt keys: the oracle scores those in float64."""
    calls: list[int] = []
    scores = attention_module._turn_scores
    monkeypatch.setattr(attention_module, "_turn_scores", lambda *a: calls.append(1) or scores(*a))
    layer = filled_layer(attached("llama-gqa", key_basis=key_basis, turn=turn), 231)
    assert layer.n_encoded == 224
    keys, values = visible_cache(layer)
    for tile, n_queries in product((1, 3, 4, 64), (1, 3, 9, 70)):  # tiles inside a turn, across turns, of whole turns
        monkeypatch.setattr(attention_module, "TILE_BLOCKS", tile)
        query = torch.randn(2, 4, n_queries, 8, generator=torch.Generator().manual_seed(0))
        mask = random_mask(n_queries, 231)
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        calls.clear()
        ours = tiled_attention(layer, query, mask, 0.3)
        absorbed = 4 * n_queries <= 16  # heads * queries against the width of the keys, as without turns
        assert bool(calls) == absorbed, (tile, n_queries)
        assert (ours - oracle(query, keys, values, bias, 0.3)).abs().max() < 1e-5, (tile, n_queries)


@pytest.mark.parametrize("family", ["phi3-partial", "llama-yarn", "qwen3"])
def test_scores_of_absorbed_queries(attached: Any, family: str) -> None:
    """Partial RoPE, scaled RoPE and wide heads: the scores themselves, against rebuilt keys."""
    layer = filled_layer(attached(family, turn=32, key_basis="per_head"), 110)
    codecs, n = layer.codecs, layer.n_encoded
    rows = torch.randn(2, codecs.n_kv_heads, 3, codecs.head_dim, generator=torch.Generator().manual_seed(0))
    latents, positions = codecs.unpack_keys(layer.packed_keys), layer.key_positions(0, n)
    ours = attention_module._turn_scores(codecs, rows, latents, positions)
    theirs = rows @ codecs.decode_keys(latents, positions).transpose(2, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("turn", [32, 64])
def test_a_padded_row_says_what_it_says_alone(attached: Any, turn: int) -> None:
    """At half of the rank, rows that differ by whole turns: nothing depends on the padding or its positions."""
    rows = [random_ids(1, n, seed=n)[0] for n in (17, 17 + 2 * turn, 17 + turn)]
    ids, mask = padded(rows)
    model = attached("llama-gqa", turn=turn)
    options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False, "pad_token_id": PAD}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, sequence in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(sequence[-70:], alone[0, -70:])


def test_turns_begin_at_whole_slots(attached: Any) -> None:
    cache = attachment_of(attached("llama-gqa", turn=32)).new_cache()
    padding = torch.tensor([[1] * 40 + [0, 1, 2], [*range(43)]])  # transformers gives padding position 1, older ones 0
    cache.tokens.append(padding, 2)
    cache.tokens.append(torch.tensor([[3 + i for i in range(60)], [43 + i for i in range(60)]]), 2)
    first = cache.tokens.key_positions(31, 97, 32)
    assert first[0].tolist() == [-40] + [-8] * 32 + [24] * 32 + [56]
    assert first[1].tolist() == [0] + [32] * 32 + [64] * 32 + [96]
    assert torch.equal(cache.tokens.key_positions(43, 97, 1), cache.tokens.positions[:, 43:97])


def cached_at(model: Any, ids: Tensor, first_position: int) -> CompressedCache:
    cache = attachment_of(model).new_cache()
    positions = torch.arange(first_position, first_position + ids.shape[1])[None]
    model(ids, past_key_values=cache, position_ids=positions)
    return cache


def test_positions_may_begin_anywhere(attached: Any) -> None:
    """Keys of a turn differ by their distance from its first token alone."""
    model = attached("llama-gqa")
    ids = random_ids(1, 110)
    for ours, theirs in zip(cached_at(model, ids, 0).layers, cached_at(model, ids, 1000).layers, strict=True):
        a, b = (layer.packed_keys.view(torch.float32) for layer in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["repeat", "select", "reorder"],
)
def test_changes_of_a_padded_batch(attached: Any, change: Any, rows: list[int]) -> None:
    model = attached("qwen2")
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (60, 100, 85)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def filled(which: list[int]) -> CompressedCache:
        cache = attachment_of(model).new_cache()
        model(ids[which], attention_mask=mask[which], position_ids=positions[which], past_key_values=cache)
        return cache

    changed, expected = filled([0, 1, 2]), filled(rows)
    change(changed)
    assert_caches_equal(changed, expected)
    longer = torch.cat([mask[rows], torch.ones(len(rows), 40, dtype=torch.long)], 1)
    new = {"attention_mask": longer, "position_ids": positions[rows][:, -1:] + 1 + torch.arange(40)}
    more = random_ids(len(rows), 40, seed=1)
    ours, theirs = (model(more, past_key_values=cache, **new).logits for cache in (changed, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert_caches_equal(changed, expected)
