"""One-token attention over a packed cache, against torch's fastest over the uncompressed one."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcompress.bench.timing import (
    cold_copies,
    copy_bytes_per_second,
    matrix_flops_per_second,
    median_replay_seconds,
)
from kvcompress.bench.workload import RECENT, Shape, random_layer
from kvcompress.checkpoint.map_budget import turn_group
from kvcompress.runtime import fast
from kvcompress.runtime.attention import tiled_attention
from kvcompress.runtime.cache import CompressedLayer

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, slots=True)
class AttentionTiming:
    """One row of the table. Times in microseconds, of one layer and one token of each sequence."""

    keep: float
    context: int
    batch: int
    microseconds: float
    sdpa_microseconds: dict[str, float]
    packed_bytes: int
    cache_bytes: int
    flops: int
    roofline_microseconds: float
    bound_by: str
    copy_share: float

    @property
    def opponent(self) -> str:
        return min(self.sdpa_microseconds, key=lambda name: self.sdpa_microseconds[name])

    @property
    def speedup(self) -> float:
        return self.sdpa_microseconds[self.opponent] / self.microseconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"opponent": self.opponent, "speedup": self.speedup}


def time_attention(
    shape: Shape, keys: dict[int, int], values: dict[int, int], *, keep: float, context: int, batch: int, turn: int,
    device: torch.device, dtype: torch.dtype,
) -> AttentionTiming:  # fmt: skip
    """Time ours and SDPA in this run; the roofline is of what ours must read and multiply at the measured rates."""
    rates = copy_bytes_per_second(device), matrix_flops_per_second(device)
    sdpa = _sdpa_microseconds(shape, context, batch, device, dtype)

    def filled() -> CompressedLayer:
        return random_layer(shape, keys, values, n_tokens=context, batch=batch, device=device, dtype=dtype, turn=turn)

    layers = [filled()]
    packed = layers[0].nbytes()
    layers += [filled() for _ in range(cold_copies(packed, device) - 1)]
    query = torch.randn(batch, shape.n_heads, 1, shape.head_dim, device=device, dtype=dtype)
    scaling = shape.head_dim**-0.5
    seconds = median_replay_seconds([lambda one=one: _attend(one, query, scaling) for one in layers], device)  # type: ignore[misc]
    products = _products(shape, sum(keys.values()), sum(values.values()), turn)
    flops = round(2 * batch * context * shape.n_heads * products)
    by_bytes, by_flops = packed / rates[0], flops / rates[1]
    return AttentionTiming(
        keep=keep,
        context=context,
        batch=batch,
        microseconds=seconds * 1e6,
        sdpa_microseconds=sdpa,
        packed_bytes=packed,
        cache_bytes=2 * batch * (context + RECENT) * shape.width * dtype.itemsize,
        flops=flops,
        roofline_microseconds=max(by_bytes, by_flops) * 1e6,
        bound_by="bytes" if by_bytes >= by_flops else "arithmetic",
        copy_share=packed / seconds / rates[0],
    )


def _products(shape: Shape, n_keys: int, n_values: int, turn: int) -> float:
    """Return the multiplications for each packed token and query head.

    Keys after RoPE: all components, and the rotated mean. Turns: those of the head's group, absorbed once a turn.
    """
    if turn == 1:
        return n_keys + n_values + shape.head_dim
    share = turn_group(shape.attention) / shape.n_kv_heads
    return share * (n_keys + n_values + n_keys * shape.head_dim / turn)


def _attend(layer: CompressedLayer, query: Tensor, scaling: float) -> Tensor:
    output = fast.attention(layer, query, None, scaling)
    return tiled_attention(layer, query, None, scaling) if output is None else output


def _sdpa_microseconds(
    shape: Shape, context: int, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Return the time of every backend of scaled_dot_product_attention that takes these tensors."""
    n_tokens = context + RECENT
    n_bytes = 2 * batch * n_tokens * shape.width * dtype.itemsize
    query = torch.randn(batch, shape.n_heads, 1, shape.head_dim, device=device, dtype=dtype)
    caches = [
        torch.randn(2, batch, shape.n_kv_heads, n_tokens, shape.head_dim, device=device, dtype=dtype)
        for _ in range(cold_copies(n_bytes, device))
    ]
    times = {}
    for name in ("cudnn", "flash", "efficient") if device.type == "cuda" else ("flash", "math"):
        with sdpa_kernel(_BACKENDS[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some releases of torch explain at length why a backend does not apply
            works = [
                lambda cache=cache: F.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=True)
                for cache in caches
            ]
            try:
                times[name] = median_replay_seconds(works, device) * 1e6
            except RuntimeError:  # this backend does not take these tensors
                continue
    return times
