"""What encoding and packing a prompt adds to its prefill: one layer of the shape, random weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.bench.timing import median_seconds
from kvcompress.bench.workload import RECENT, Shape, random_layer
from kvcompress.plan import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """Milliseconds of one layer for one prompt of `context` tokens."""

    context: int
    layer_milliseconds: float
    encode_milliseconds: float

    @property
    def share(self) -> float:
        return self.encode_milliseconds / self.layer_milliseconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


def time_prefill(
    shape: Shape,
    keys: dict[int, int],
    values: dict[int, int],
    *,
    context: int,
    turn: int,
    device: torch.device,
    dtype: torch.dtype,
) -> PrefillTiming:
    """Time a decoder layer without the head (projections, causal attention, MLP), and packing its keys and values."""
    x = torch.randn(context, shape.d_model, device=device, dtype=dtype)
    weights = _weights(shape, device, dtype)
    layer = random_layer(shape, keys, values, n_tokens=BLOCK_TOKENS, batch=1, device=device, dtype=dtype, turn=turn)
    n_tokens = context // BLOCK_TOKENS * BLOCK_TOKENS
    kv = torch.randn(2, 1, shape.n_kv_heads, n_tokens, shape.head_dim, device=device, dtype=dtype)
    positions = torch.arange(n_tokens, device=device)[None]

    def encode() -> None:
        layer.codecs.pack_keys(kv[0], positions)
        layer.codecs.pack_values(kv[1])

    with torch.no_grad():
        forward = median_seconds(lambda: _layer(x, weights, shape), device, repeats=5, warmup=2)
        packing = median_seconds(encode, device, repeats=10, warmup=2)
    return PrefillTiming(context, forward * 1e3, packing * 1e3)


def _weights(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {
        "qkv": ((shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim, shape.d_model),
        "o": (shape.d_model, shape.n_heads * shape.head_dim),
        "up": (2 * shape.d_mlp, shape.d_model),
        "down": (shape.d_model, shape.d_mlp),
    }
    return {name: torch.randn(size, device=device, dtype=dtype) * size[1] ** -0.5 for name, size in sizes.items()}


def _layer(x: Tensor, weights: dict[str, Tensor], shape: Shape) -> Tensor:
    heads = (x @ weights["qkv"].T).unflatten(1, (-1, shape.head_dim)).transpose(0, 1)[None]
    q, k, v = heads.split((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), 1)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    x = x + mixed @ weights["o"].T
    gate, up = (x @ weights["up"].T).chunk(2, 1)
    return x + (F.silu(gate) * up) @ weights["down"].T


def sequences_that_fit(shape: Shape, bytes_per_token: float, *, context: int, memory_bytes: float) -> int:
    """Return how many sequences of `context` tokens fit beside the layers' bfloat16 weights (embeddings left out).

    bytes_per_token: of one layer's packed cache; the exact window is added.
    """
    per_layer = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim + shape.n_heads * shape.head_dim
    weights = 2 * shape.n_layers * shape.d_model * (per_layer + 3 * shape.d_mlp)
    one = shape.n_layers * (bytes_per_token * context + 2 * 2 * RECENT * shape.width)
    return max(0, int((memory_bytes - weights) / one))
