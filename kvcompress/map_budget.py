"""How wide blocks may be, so that all maps together stay a small share of the weights."""

from __future__ import annotations

from kvcompress.checkpoint.reader import Checkpoint

#: All maps together may take this share of the weight bytes, by default.
MAPS_SHARE = 0.03
#: Moments are kept for blocks that would fit into the share at this keep or below.
_MOMENTS_KEEP = 0.25


def default_group(checkpoint: Checkpoint, keep: float) -> int:
    """Return the most KV heads per block of `latent` with which all maps take at most 3% of the weight bytes."""
    attention = checkpoint.spec.layers[0]
    limit = widest_block(checkpoint, keep)
    groups = (g for g in range(attention.n_kv_heads, 0, -1) if attention.n_kv_heads % g == 0)
    return next((g for g in groups if g * attention.head_dim <= limit), 1)


def widest_block(checkpoint: Checkpoint, keep: float = _MOMENTS_KEEP) -> int:
    """Return the block width w at which encoders and decoders, 2 w numbers per kept component, reach the share."""
    spec = checkpoint.spec
    map_bytes = 4 if spec.dtype == "float32" else 2
    return int(MAPS_SHARE * checkpoint.weight_bytes / (2 * map_bytes * keep * spec.cache_numbers_per_token))
