"""Which layers have keys in turns where the options leave it open: those that the GPU kernels take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcompress.choose.turning import group_in_turns, takes_turns, turns_of
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Site
from kvcompress.model.rotation import Rotation
from kvcompress.options import DEFAULT_TURN, QUAD, CompressOptions

WHOLE = Rotation(tuple(1 / (i + 1) for i in range(32)))
LAYER = AttentionSpec(0, 9, 3, 64, 64, rotation=WHOLE, readers=("attention",))


def spec_of(*layers: AttentionSpec) -> ModelSpec:
    numbered = tuple(replace(layer, layer=i) for i, layer in enumerate(layers))
    return ModelSpec("llama", "bfloat16", 576, 1000, numbered)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 80, "rotary_dim": 80, "rotation": None},
        {"rotation": Rotation(WHOLE.frequencies[:16])},  # partial
        {"rotation": Rotation(WHOLE.frequencies, interleaved=True)},
        {"rotation": None, "rotary_dim": 0},  # no RoPE
        {"n_heads": 48},  # sixteen query heads of a KV head
        {"readers": ()},  # latent attention works on what the cache returns
        {"values": AttentionSpec(0, 9, 3, 128, 0)},
    ],
    ids=lambda c: ",".join(c),
)
def test_a_layer_that_the_kernels_refuse_has_no_turns(change: dict[str, object]) -> None:
    assert takes_turns(LAYER)
    refused = replace(LAYER, **change)  # type: ignore[arg-type]
    assert not takes_turns(refused)
    keys = Site(0, "key"), Site(1, "key")
    assert turns_of(spec_of(LAYER, refused), CompressOptions()) == dict(zip(keys, (DEFAULT_TURN, 1), strict=True))
    # One that was chosen is for all layers.
    assert turns_of(spec_of(LAYER, refused), CompressOptions(turn=64)) == dict.fromkeys(keys, 64)


@pytest.mark.parametrize(
    "options",
    [CompressOptions(key_basis="per_head"), CompressOptions(value_basis="per_head"), CompressOptions(turn=1)],
)
def test_other_bases_have_no_turns_unless_they_are_chosen(options: CompressOptions) -> None:
    assert set(turns_of(spec_of(LAYER), options).values()) == {1}
    assert options.at_a_time == 1 and CompressOptions().at_a_time == QUAD


def test_groups_are_those_of_the_kernels_where_there_are_turns() -> None:
    wide = AttentionSpec(0, 32, 8, 128, 128, readers=("attention",), rotation=None)
    known = replace(wide, rotation=Rotation(tuple(1.0 for _ in range(64))))
    assert group_in_turns(spec_of(known), CompressOptions(), 8) == 2
    assert group_in_turns(spec_of(known), CompressOptions(turn=1), 8) == 8
    assert group_in_turns(spec_of(replace(wide, rotary_dim=0)), CompressOptions(), 8) == 8
