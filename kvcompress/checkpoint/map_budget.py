"""How wide blocks may be, so that all maps together stay a small share of the weights."""

from __future__ import annotations

import math

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.model.model_spec import AttentionSpec

#: With turns a GPU kernel works on groups of KV heads of at most so many numbers together, for so many of their query
#: heads at once.
_TURN_WIDTH, TURN_COLUMNS = 256, 8
#: Blocks narrower than this give away too much (docs/measurements.md): rather let the kernel read the codes twice.
_NARROW = 128
#: All maps together may take this share of the weight bytes, by default.
MAPS_SHARE = 0.03
#: Moments are kept for the groups of heads that would fit into the share at this keep; smaller keeps use the same.
_LEAST_KEEP = 0.25


def default_group(checkpoint: Checkpoint, keep: float) -> int:
    """Return the most KV heads per block of `latent` with which all maps take at most 3% of the weight bytes.

    It divides `moments_group`, so that another budget finds its moments among the saved ones.
    """
    return _largest_group(checkpoint, moments_group(checkpoint), max(keep, _LEAST_KEEP))


def moments_group(checkpoint: Checkpoint) -> int:
    """Return the KV heads per block for which moments are worth keeping: the group at the smallest keep."""
    heads = [checkpoint.spec.attention(site).n_kv_heads for site in checkpoint.spec.sites]
    return _largest_group(checkpoint, math.gcd(*heads), _LEAST_KEEP)


def turn_group(attention: AttentionSpec, group: int | None = None) -> int:
    """Return the KV heads per block of `latent` that suit the kernel for keys in turns, a divisor of `group`.

    As many as have query heads that it takes at once; twice as many where blocks were narrow, or to have all in one.
    """
    most = TURN_COLUMNS * attention.n_kv_heads // attention.n_heads
    if most * attention.head_dim < _NARROW or attention.n_kv_heads <= 2 * most:
        most *= 2
    most = min(most, _TURN_WIDTH // attention.head_dim)
    return next((g for g in range(most, 1, -1) if (group or attention.n_kv_heads) % g == 0), 1)


def _largest_group(checkpoint: Checkpoint, n_heads: int, keep: float) -> int:
    """Return the largest divisor of n_heads with which encoders and decoders, 2 w numbers a component, fit."""
    spec = checkpoint.spec
    map_bytes = 4 if spec.dtype == "float32" else 2
    widest = MAPS_SHARE * checkpoint.weight_bytes / (2 * map_bytes * keep * spec.cache_numbers_per_token)
    groups = (g for g in range(n_heads, 0, -1) if n_heads % g == 0)
    head_dim = max(spec.attention(site).head_dim for site in spec.sites)
    return next((g for g in groups if g * head_dim <= widest), 1)
