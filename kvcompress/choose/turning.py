"""Turns: in which layers keys are un-rotated turn by turn, where the options leave that open.

Keys in turns are what GPU kernels score without rebuilding any (docs/speed.md), and cost some quality. So the default
has them where those kernels take the layer, on every device: an output is the same wherever it was made.
"""

from __future__ import annotations

from kvcompress.checkpoint.map_budget import TURN_COLUMNS, turn_group
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Site
from kvcompress.options import TURN_HEAD_DIMS, CompressOptions


def turns_of(spec: ModelSpec, options: CompressOptions) -> dict[Site, int]:
    """Return the tokens of a turn of every layer's keys, 1 where each key is un-rotated by its own position."""
    chosen = options.turn is None
    turns = {}
    for attention in spec.layers:
        fits = not chosen or takes_turns(attention)
        turns[Site(attention.layer, "key")] = options.most_turn if fits else 1
    return turns


def takes_turns(attention: AttentionSpec) -> bool:
    """Return whether the kernels for keys in turns take a layer: RoPE turns whole heads of a size that they know."""
    rotation, head_dim = attention.rotation, attention.head_dim
    whole = attention.rotary_dim == head_dim
    if rotation is not None:
        whole = rotation.width == head_dim and not rotation.start and not rotation.interleaved
    values = attention.of("value")
    alike = (values.n_kv_heads, values.head_dim, values.rotary_dim) == (attention.n_kv_heads, head_dim, 0)
    is_read = bool(attention.readers) or attention.key is not None  # by attention itself; see AttentionSpec
    few = attention.n_heads <= TURN_COLUMNS * attention.n_kv_heads
    return whole and alike and is_read and few and head_dim in TURN_HEAD_DIMS


def group_in_turns(spec: ModelSpec, options: CompressOptions, group: int) -> int:
    """Return the KV heads of a block of `latent`: `group`, or the divisor of it that the layers with turns take."""
    turns = turns_of(spec, options)
    sizes = [turn_group(a, group) for a in spec.layers if turns[Site(a.layer, "key")] > 1]
    return min(sizes, default=group)
