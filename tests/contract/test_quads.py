"""Keys in turns of 128 tokens and more: plans keep components in quads, so that every layer's rows can have tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.options import QUAD, CompressOptions
from kvcompress.planning import make_plan
from kvcompress.runtime.attach import attach_plan, attachment_of
from tests.contract.test_runtime_attention import decode_one_by_one
from tests.contract.test_runtime_cache import fill
from tests.tiny_models import random_ids


@pytest.fixture
def planned(tiny_plan: Any) -> Any:
    """planned(family, **options): (plan, maps) of make_plan, in turns of 256 tokens unless told otherwise."""
    usual = {"keep": 0.25, "sinks": 2, "recent": 4, "turn": 256}
    return lambda family, **options: tiny_plan(family, **(usual | options))


def class_sizes(maps: Any) -> torch.Tensor:
    """Return how many components each block has of each number of bits, where it has any."""
    return torch.stack([maps.bits.int(), maps.block]).unique(dim=1, return_counts=True)[1]


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bf16", "qwen3", "phi3-partial", "smollm3"])
@pytest.mark.parametrize("key_basis", ["per_head", "latent"])
@pytest.mark.parametrize("value_basis", ["per_head", "latent"])
@pytest.mark.parametrize("turn", [128, 256])
@pytest.mark.parametrize("ranks_only", [False, True])
def test_blocks_have_quads_of_every_number_of_bits(
    planned: Any, family: str, key_basis: str, value_basis: str, turn: int, ranks_only: bool
) -> None:
    plan, maps = planned(
        family, key_basis=key_basis, value_basis=value_basis, turn=turn, ranks_only=ranks_only, keep=0.3
    )
    assert plan.keep <= 0.3 and len(maps) > 1
    assert all((class_sizes(m) % QUAD == 0).all() for m in maps.values())


@pytest.mark.parametrize("keep", [0.0625, 0.125, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("policy", ["loss", "uniform", "energy"])
@pytest.mark.parametrize("ranks_only", [False, True])
def test_never_above_the_budget_and_close_to_it(planned: Any, keep: float, policy: str, ranks_only: bool) -> None:
    if ranks_only and policy != "loss" and keep < 0.25:
        pytest.skip("a site of 16 numbers has no room for four")
    plan, maps = planned("llama-gqa", keep=keep, policy=policy, ranks_only=ranks_only)
    assert plan.keep <= keep
    if policy == "loss":
        assert plan.keep > 0.95 * keep - 0.03
    assert all(s.exact for s in plan.sites) == (keep == 1.0)
    assert all((class_sizes(m) % QUAD == 0).all() for m in maps.values())


@pytest.mark.parametrize("ranks_only", [False, True])
def test_every_layer_of_such_a_plan_has_tiles(planned: Any, tiny_model: Any, ranks_only: bool) -> None:
    model = attach_plan(tiny_model("llama-bf16"), *planned("llama-bf16", ranks_only=ranks_only, policy="uniform"))
    for codecs in attachment_of(model).codecs:
        assert [c.tiles.part for c in (codecs.key, codecs.value)] == ["key", "value"]


def test_components_are_taken_singly_where_rows_cannot_have_tiles(planned: Any) -> None:
    assert CompressOptions(turn=128).at_a_time == CompressOptions(turn=512, ranks_only=True).at_a_time == QUAD
    for options in (
        {"turn": 1},
        {"turn": 64},
        {"turn": 128, "key_basis": "band"},
        {"turn": 128, "value_basis": "head", "ranks_only": True},
    ):
        assert CompressOptions(**options).at_a_time == 1
    _, maps = planned("llama-gqa", turn=64)
    assert any((class_sizes(m) % QUAD != 0).any() for m in maps.values())


def test_quads_cost_little(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    """Predicted loss of the same moments, budget and turn, taken singly (as turns of 128 were before) and in quads."""
    losses, moments = {}, tiny_moments("llama-gqa")
    for ranks_only in (False, True):
        for at_a_time in (1, QUAD):
            options = CompressOptions(ranks_only=ranks_only, keep=0.5, sinks=2, recent=4, turn=256)
            with pytest.MonkeyPatch.context() as patch, open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
                patch.setattr(CompressOptions, "at_a_time", at_a_time)
                plan, _, _ = make_plan(checkpoint, moments, options)
            losses[at_a_time] = plan.predicted_loss
        assert losses[1] < losses[QUAD] < 1.5 * losses[1]


@pytest.mark.parametrize("ranks_only", [False, True])
def test_decoding_does_not_depend_on_the_layout(planned: Any, tiny_model: Any, ranks_only: bool) -> None:
    plan, maps = planned("llama-bf16", ranks_only=ranks_only, policy="uniform")
    ids, logits, packed = random_ids(2, 110), [], []
    for tiled in (True, False):
        model = attach_plan(tiny_model("llama-bf16"), plan, maps)
        if not tiled:
            for codecs in attachment_of(model).codecs:
                codecs.key.tiles = codecs.value.tiles = None
        logits.append(decode_one_by_one(model, ids))
        cache, _ = fill(model, ids, 110)
        assert cache.nbytes() == 2 * plan.cache_bytes(110, exact_number_bytes=4)
        packed.append(cache.layers[0].packed_keys)
    assert torch.equal(*logits)
    assert packed[0].shape == packed[1].shape and not torch.equal(*packed)
