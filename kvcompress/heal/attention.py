"""Attention while a healing trains: every query sees the cache as at run time, and gradients reach the maps.

Queries are taken in chunks. What a chunk sees compressed and what it sees exactly (sinks, window) are put side by
side, so that one call of torch's scaled-dot-product attention, whose kernels keep no scores, gives output and
gradients; memory grows with the length of the text, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvcompress import compat
from kvcompress.errors import UnsupportedModelError
from kvcompress.heal.layers import TrainableLayer

ATTENTION_NAME = "kvcompress_heal"
_QUERIES = 512
#: Arguments of attention functions that change its result and that a healing does not compute.
_UNKNOWN = ("softcap", "s_aux", "sinks")


class Chunk(NamedTuple):
    """What some queries see: keys before n_coded compressed, those of the slices `near` exactly, where bias is 0.

    bias: [1 or batch, 1, groups * n_queries, n_coded + those near], -inf for what a query does not see so.
    """

    n_coded: int
    near: tuple[slice, ...]
    bias: Tensor

    def seen(self, coded: Tensor, exact: Tensor) -> Tensor:
        """Return what the queries see of [batch, heads, n_tokens, width]: slices, whose gradients need no sorting."""
        parts = [exact[:, :, rows] for rows in self.near]
        return torch.cat([coded[:, :, : self.n_coded], *(part.to(coded.dtype) for part in parts)], 2)


@dataclass
class Switch:
    """Whether the model runs as it is (the teacher) or with the compressed cache, and what stays exact there."""

    sinks: int
    recent: int
    folded: bool
    on: bool = True
    _biases: dict[Any, Tensor] = field(default_factory=dict)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model runs with its own attention."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def chunk(self, start: int, stop: int, *, groups: int, like: Tensor, mask: Tensor | None) -> Chunk:
        """Return what queries start..stop see; `groups` query heads share a KV head and are rows of one matrix.

        like: a tensor of the queries' dtype and device. mask: bool [batch, 1, n_tokens, n_tokens] or None, see
        `decode_faithful`.
        """
        n_coded = max(0, stop - 1 - self.recent)
        place = torch.arange(stop, device=like.device)
        slices = (slice(0, min(self.sinks, stop)), slice(max(self.sinks, start - self.recent), stop))
        near = torch.cat([place[rows] for rows in slices])
        key = (start, stop, groups, like.dtype, like.device)
        if mask is None and key in self._biases:
            return Chunk(n_coded, slices, self._biases[key])
        query = place[start:stop, None]
        coded = (place[:n_coded] >= self.sinks) & (place[:n_coded] < query - self.recent)
        exact = (near <= query) & ((near < self.sinks) | (near >= query - self.recent))
        seen = torch.cat([coded, exact], 1)[None, None]
        if mask is not None:
            allowed = mask[:, :, start:stop]
            seen = seen & torch.cat([allowed[..., :n_coded], allowed[..., near]], -1)
        bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))
        bias = bias.repeat(1, 1, groups, 1)
        if mask is None:
            self._biases[key] = bias
        return Chunk(n_coded, slices, bias)


def healing_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return (output [batch, n_queries, heads, head_dim], None), as transformers' attention interface asks.

    Raises UnsupportedModelError for attention that is not a plain softmax of scores.
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModelError(f"this model's attention has {unknown[0]}, with which healing does not train yet.")
    kwargs["dropout"] = 0.0
    layer, switch = module.__dict__.get("kvcompress_heal", (None, None))  # none: a layer that keeps its own cache
    if layer is None or not switch.on:
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    if switch.folded:
        with torch.autocast(query.device.type, enabled=False):
            key, value = layer.expanded(key, value)
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return decode_faithful(layer, switch, query, key, value, attention_mask, scaling), None


def decode_faithful(
    layer: TrainableLayer,
    switch: Switch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return what decoding token by token would give for whole windows: [batch, n_tokens, heads, head_dim].

    query: [batch, heads, n_tokens, head_dim]; key, value: [batch, kv heads, n_tokens, head_dim], keys after RoPE;
    mask: bool [batch, 1, n_tokens, n_tokens], what each query may see at all, or None where that is all before it.
    """
    (batch, n_kv_heads, n_tokens, _), groups = key.shape, query.shape[1] // key.shape[1]
    positions = torch.arange(n_tokens, device=key.device)[None].expand(batch, -1)
    with torch.autocast(query.device.type, enabled=False):
        coded_key = layer.seen_keys(key, positions).to(query.dtype)
        coded_value = layer.seen_values(value).to(query.dtype)
    by_group = query.unflatten(1, (n_kv_heads, groups))  # [batch, kv heads, groups, n_tokens, head_dim]
    outputs = []
    for start in range(0, n_tokens, _QUERIES):
        stop = min(start + _QUERIES, n_tokens)
        chunk = switch.chunk(start, stop, groups=groups, like=query, mask=mask)
        output = functional.scaled_dot_product_attention(
            by_group[:, :, :, start:stop].flatten(2, 3),
            chunk.seen(coded_key, key),
            chunk.seen(coded_value, value),
            attn_mask=chunk.bias,
            scale=scaling,
        )
        outputs.append(output.unflatten(2, (groups, stop - start)))
    return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2)


def use_healing_attention(model: Any, readers: list[tuple[Any, TrainableLayer]], switch: Switch) -> None:
    """Make attention modules of a model see their cache through their layers, which become no part of the model."""
    model.__dict__["kvcompress_heal_before"] = compat.use_attention(model, ATTENTION_NAME, healing_attention)
    for module, layer in readers:
        module.__dict__["kvcompress_heal"] = (layer, switch)


def use_own_attention(model: Any) -> None:
    """Undo `use_healing_attention`."""
    model.__dict__.pop("kvcompress_heal_before").restore()
    for module in model.modules():
        module.__dict__.pop("kvcompress_heal", None)
