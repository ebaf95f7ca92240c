"""The blocks of `latent`: as wide as the maps' share of the weights allows, and always among the saved moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcompress.bases import BASES
from kvcompress.calibration.moments import usable_partitions
from kvcompress.checkpoint.headers import TensorEntry
from kvcompress.checkpoint.map_budget import MAPS_SHARE, default_group, moments_group, turn_group
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.choose.fitting import key_basis
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Projection
from kvcompress.options import CompressOptions

KEEPS = (0.05, 0.125, 0.25, 0.5, 0.75, 1.0)
#: (n_heads, n_kv_heads, head_dim) of Llama 2 7B and 13B, Phi-3-mini, models with 12, 20 and 24 heads, and GQA ones.
SHAPES = [
    (32, 32, 128), (40, 40, 128), (32, 32, 96), (12, 12, 64), (20, 20, 128), (24, 24, 64), (32, 8, 128), (9, 3, 64),
    (14, 2, 64),
]  # fmt: skip


def checkpoint(n_heads: int, n_kv_heads: int, head_dim: int, dtype: str = "bfloat16") -> Checkpoint:
    """A model of 32 layers that is nothing but sizes."""
    hidden, width = n_heads * head_dim, n_kv_heads * head_dim
    projection = Projection("w", None, "m", 0, width)
    layers = tuple(AttentionSpec(i, n_heads, n_kv_heads, head_dim, head_dim, projection, projection) for i in range(32))
    spec = ModelSpec("llama", dtype, hidden, 32000, layers)
    code = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    n_weights = 32 * (2 * hidden * hidden + 2 * hidden * width + 3 * hidden * int(2.7 * hidden)) + 2 * 32000 * hidden
    return Checkpoint(Path("nowhere"), "nowhere", {}, spec, {"all": TensorEntry("f", (n_weights,), code)})


def map_bytes(model: Checkpoint, group: int, keep: float) -> int:
    """Return the bytes of all maps at equal ranks, counted tensor by tensor as the file stores them."""
    size = {"bfloat16": 2, "float32": 4}[model.spec.dtype]
    n, total = model.spec.layers[0].width, 0
    for _ in model.spec.sites:
        rank = int(keep * n) if keep < 1 else n
        width = group * model.spec.layers[0].head_dim
        total += 2 * rank * width * size + n * 4 + rank * (4 + 1) + n * 4  # encoder, decoder, blocks, block, bits, mean
    return total


def stored_moments(model: Checkpoint) -> list[Tensor]:
    """Return the blocks whose moments a calibration keeps by default."""
    return usable_partitions(model.spec.layers[0], moments_group(model), CompressOptions().band)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_maps_take_at_most_three_percent(shape: tuple[int, int, int], keep: float) -> None:
    """And the next wider blocks would take more, among those whose moments are kept."""
    model = checkpoint(*shape)
    group = default_group(model, keep)
    assert shape[1] % group == 0
    # A tenth of slack for what is no matrix: block numbers, bits, means.
    assert map_bytes(model, group, keep) <= 1.1 * MAPS_SHARE * model.weight_bytes or group == 1
    kept = moments_group(model)
    wider = [g for g in range(group + 1, kept + 1) if kept % g == 0]
    if wider and keep >= 0.25:
        assert map_bytes(model, wider[0], keep) > MAPS_SHARE * model.weight_bytes


def test_known_models() -> None:
    """Llama 2 7B (n = 4096): blocks of 4 heads at half of the cache. Eight KV heads: one block."""
    assert default_group(checkpoint(32, 32, 128), 0.5) == 4
    assert default_group(checkpoint(32, 8, 128), 0.5) == 8


def inside(wanted: Tensor, stored: list[Tensor]) -> bool:
    """Whether every wanted block lies within one block of one of the stored partitions."""
    for partition in stored:
        home = torch.empty(partition.numel(), dtype=torch.long)
        for b, row in enumerate(partition):
            home[row] = b
        blocks = home[wanted]
        if bool((blocks == blocks[:, :1]).all()):
            return True
    return False


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_saved_moments_serve_every_default_basis(shape: tuple[int, int, int], keep: float) -> None:
    """A calibration for the default budget serves any other: the blocks of each basis lie within stored ones."""
    model, options = checkpoint(*shape), CompressOptions(keep=keep)
    attention, stored = model.spec.layers[0], stored_moments(model)
    for name in ("head", "share", "frequency", "per_head"):
        assert inside(BASES[name]().blocks(attention), stored), name
    assert inside(key_basis(model, options).blocks(attention), stored), "latent"
    if attention.head_dim % options.band == 0:
        assert inside(BASES["band"](options.band).blocks(attention), stored), "band"


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_bounded(shape: tuple[int, int, int]) -> None:
    """float64 C and F of every site take less than the weights themselves."""
    model = checkpoint(*shape)
    stored = stored_moments(model)
    per_site = sum(2 * 8 * p.shape[0] * p.shape[1] ** 2 for p in stored)
    assert per_site * len(model.spec.sites) <= model.weight_bytes


@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        ((32, 8, 128), 2),
        ((64, 8, 128), 1),
        ((32, 32, 64), 4),
        ((12, 12, 32), 6),
        ((8, 1, 256), 1),
        ((9, 3, 64), 3),  # nine query heads, so that all heads are in one block
        ((14, 2, 64), 2),
        ((32, 8, 32), 4),  # rather two passes than blocks of 64 numbers
    ],
)
def test_turns_have_groups_of_eight_query_heads_and_256_numbers_unless_blocks_were_narrow(
    sizes: tuple[int, int, int], group: int
) -> None:
    assert turn_group(checkpoint(*sizes).spec.layers[0]) == group


def test_a_turns_group_lies_within_the_stored_one() -> None:
    assert turn_group(checkpoint(12, 12, 32).spec.layers[0], 4) == 4
