"""The compressed cache: its bytes are those that the plan claims, and every change of the batch keeps it sound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.cache import CompressedCache
from tests.coding import coded_plan
from tests.tiny_models import FAMILIES, random_ids


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    """attached(family, **options): a model with a plan of make_plan."""

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        options = {"keep": 0.5, "sinks": 2, "recent": 4, "policy": "uniform", "ranks_only": True} | options
        return attach_plan(tiny_model(family, dtype=dtype), *tiny_plan(family, **options))

    return make


def fill(model: Any, ids: torch.Tensor, n_prompt: int) -> tuple[CompressedCache, torch.Tensor]:
    """Return (the cache, the last logits) after a prompt at once and the rest token by token."""
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        output = model(ids[:, :n_prompt], past_key_values=cache)
        for t in range(n_prompt, ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=cache)
    return cache, output.logits[:, -1]


def sdpa_bytes(cache: CompressedCache) -> int:
    """Count the cache's storages independently: every tensor that it or its layers reach, each storage once."""
    storages: dict[int, int] = {}
    for owner in [*cache.layers, cache.tokens]:
        for value in (getattr(value, "filled", value) for value in vars(owner).values()):
            if isinstance(value, torch.Tensor) and value.ndim > 1:  # one-dimensional ones hold a number a sequence
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama-bf16"])
def test_bytes_equal_the_claim(attached: Any, family: str) -> None:
    model = attached(family, policy="loss")  # leaves some sites of the tiny models whole, and some empty
    plan: Plan = attachment_of(model).plan
    assert plan.keep <= 0.5
    ids = random_ids(1, 110)
    for n_prompt, n_tokens in ((3, 3), (5, 8), (9, 40), (70, 110)):
        cache, _ = fill(model, ids[:, :n_tokens], n_prompt)
        assert cache.nbytes() == plan.cache_bytes(n_tokens, exact_number_bytes=4)
        assert sdpa_bytes(cache) == cache.nbytes()


OTHER_BASES = [("share", "head"), ("frequency", "latent"), ("band", "per_head")]


@pytest.mark.parametrize(("key_basis", "value_basis"), OTHER_BASES)
def test_bytes_of_other_bases(attached: Any, key_basis: str, value_basis: str) -> None:
    model = attached("llama-mha", key_basis=key_basis, value_basis=value_basis)
    cache, _ = fill(model, random_ids(1, 40), 20)
    assert cache.nbytes() == attachment_of(model).plan.cache_bytes(40, exact_number_bytes=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_a_bfloat16_checkpoint(attached: Any, dtype: torch.dtype) -> None:
    model = attached("llama-bf16", dtype=dtype)
    cache, logits = fill(model, random_ids(1, 40), 20)
    assert cache.nbytes() == attachment_of(model).plan.cache_bytes(40, exact_number_bytes=dtype.itemsize)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (4, 0), (0, 7), (4, 64)])
def test_bytes_of_any_window(attached: Any, sinks: int, recent: int) -> None:
    model = attached("llama-gqa", sinks=sinks, recent=recent)
    cache, _ = fill(model, random_ids(1, 120), 80)
    assert cache.nbytes() == attachment_of(model).plan.cache_bytes(120, exact_number_bytes=4)


@pytest.mark.parametrize("options", [{}, {"policy": "middle", "layers": "1:2", "keep": 0.8}])
def test_a_cache_that_grew_states_its_room(attached: Any, options: dict[str, Any]) -> None:
    """What is claimed is what the tokens take; at most an eighth of it is room, none of it after a prompt."""
    model, ids = attached("llama-gqa", **options), random_ids(1, 488)
    plan, cache = attachment_of(model).plan, attachment_of(model).new_cache()
    rooms = []
    with torch.no_grad():
        for n_tokens, part in zip(range(300, 500, 4), [ids[:, :300], *ids[:, 300:].split(4, 1)], strict=False):
            model(part, past_key_values=cache)
            claim = plan.cache_bytes(n_tokens, exact_number_bytes=4)
            rooms.append(cache.room_bytes())
            assert cache.nbytes() == claim + cache.room_bytes() == sdpa_bytes(cache)
            assert cache.room_bytes() <= claim / 8
    assert rooms[0] == 0 < max(rooms)


def test_bytes_of_a_batch_are_those_of_its_sequences(attached: Any) -> None:
    model = attached("llama-gqa")
    cache, _ = fill(model, random_ids(3, 40), 20)
    assert cache.nbytes() == 3 * attachment_of(model).plan.cache_bytes(40, exact_number_bytes=4)


def test_generation_keeps_to_the_claim(attached: Any) -> None:
    model = attached("llama-gqa")
    output = model.generate(random_ids(1, 20), max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True)
    assert output.past_key_values.nbytes() == attachment_of(model).plan.cache_bytes(49, exact_number_bytes=4)


def test_a_cache_of_a_quarter_is_a_quarter(attached: Any, tiny_model: Any) -> None:
    """Against the storages of a DynamicCache, not against the plan's own idea of the original."""
    model = attached("qwen2", keep=0.25, key_basis="frequency", value_basis="latent", sinks=0, recent=0)
    ids = random_ids(1, 64)
    cache, _ = fill(model, ids, 64)
    original = tiny_model("qwen2")(ids).past_key_values
    whole = sum(t.untyped_storage().nbytes() for layer in original.layers for t in (layer.keys, layer.values))
    assert cache.layers[0].get_seq_length() == 64
    assert 0.2 * whole < cache.nbytes() - 4 * 64 <= 0.25 * whole  # 4 bytes a token are its position


def test_a_site_of_rank_zero(attached: Any) -> None:
    """A budget so small that some sites keep nothing at all."""
    model = attached("llama-gqa", keep=0.05, policy="loss")
    plan = attachment_of(model).plan
    assert min(s.rank for s in plan.sites) == 0
    cache, logits = fill(model, random_ids(2, 30), 12)
    assert logits.isfinite().all()
    assert cache.nbytes() == 2 * plan.cache_bytes(30, exact_number_bytes=4)


def test_a_cache_with_exact_sites_and_layers(attached: Any) -> None:
    """Policy middle leaves two of three layers whole; those are never encoded."""
    model = attached("llama-gqa", policy="middle", layers="1:2", keep=0.8)
    plan = attachment_of(model).plan
    cache, _ = fill(model, random_ids(1, 40), 20)
    assert [layer.n_encoded for layer in cache.layers] == [0, 32, 0]
    assert cache.nbytes() == plan.cache_bytes(40, exact_number_bytes=4)


def states(cache: CompressedCache) -> list[torch.Tensor]:
    named = (
        getattr(layer, name)
        for layer in cache.layers
        for name in ("keys", "values", "packed_keys", "packed_values", "sink_keys", "sink_values")
    )
    return [cache.tokens.positions, *(t.view(torch.float32) for t in named)]  # ranks alone: packed numbers are float32


def assert_caches_equal(ours: CompressedCache, theirs: CompressedCache) -> None:
    for a, b in zip(states(ours), states(theirs), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["repeat", "select", "reorder"],
)
def test_changes_of_the_batch(attached: Any, change: Any, rows: list[int]) -> None:
    model = attached("qwen2")
    ids, more = random_ids(3, 45), random_ids(len(rows), 6, seed=1)
    changed, _ = fill(model, ids, 20)
    change(changed)
    expected, _ = fill(model, ids[rows], 20)
    assert_caches_equal(changed, expected)
    ours = model(more, past_key_values=changed).logits
    theirs = model(more, past_key_values=expected).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_kept", [78, 65, 64, 51, 32, 2, 1])
@pytest.mark.usefixtures("never_exact")
def test_crop_forgets_the_end(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any, n_kept: int) -> None:
    """At full rank a cropped cache continues like one that never saw the rest; 78 crops the window alone."""
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        plan, maps = coded_plan(checkpoint, tiny_moments("llama-gqa"), sinks=3, recent=4)
    model = attach_plan(tiny_model("llama-gqa"), plan, maps)
    ids, more = random_ids(2, 80), random_ids(2, 40, seed=1)
    cropped, _ = fill(model, ids, 70)
    cropped.crop(n_kept - 80)
    assert cropped.get_seq_length() == cropped.tokens.positions.shape[1] == n_kept
    short, _ = fill(model, ids[:, :n_kept], n_kept)
    for token in more.split(1, 1):
        ours = model(token, past_key_values=cropped).logits
        theirs = model(token, past_key_values=short).logits
        torch.testing.assert_close(ours, theirs, rtol=5e-4, atol=5e-4)


def test_crop_down_to_a_length(attached: Any) -> None:
    """The older way to ask: a positive number is the length that remains."""
    model = attached("llama-gqa")
    cache, _ = fill(model, random_ids(1, 30), 20)
    cache.crop(17)
    assert cache.get_seq_length() == 17


def test_cropping_everything_leaves_an_empty_cache(attached: Any) -> None:
    model = attached("llama-gqa")
    cache, _ = fill(model, random_ids(1, 50), 40)
    cache.crop(-50)
    assert cache.get_seq_length() == 0
    ids = random_ids(1, 45, seed=2)
    fresh, _ = fill(model, ids, 45)
    model(ids, past_key_values=cache)
    assert_caches_equal(cache, fresh)


def test_reset_leaves_an_empty_cache(attached: Any) -> None:
    model = attached("llama-gqa")
    cache, _ = fill(model, random_ids(2, 50), 40)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes() == 0
    ids = random_ids(1, 45, seed=2)
    model(ids, past_key_values=cache)
    fresh, _ = fill(model, ids, 45)
    assert_caches_equal(cache, fresh)


def test_encoding_waits_for_whole_blocks(attached: Any) -> None:
    model = attached("llama-gqa", recent=40)
    plan = attachment_of(model).plan
    encoded = []
    for n_tokens in (71, 72, 103, 104):
        cache, _ = fill(model, random_ids(1, n_tokens), n_tokens)
        encoded.append(cache.layers[0].n_encoded)
        assert plan.n_encoded(n_tokens) == encoded[-1]
    assert encoded == [0, 32, 32, 64]
