"""Attention that tells apart what a query sees exactly and what it would see compressed.

The Fisher information of a cached key or value must count only the queries that will read it compressed: those
at least a recent window away. Here near and far keys are separate leaves of the autograd graph with equal values,
so the gradient of the far ones is taken alone, while the layers below still receive the whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import sdpa_attention_forward, use_attention

ATTENTION_NAME = "kvcompress_calibration"
_QUERIES = 256


class FarTaps:
    """The far keys (after RoPE) and values of the layer last run with gradients."""

    def __init__(self, recent: int) -> None:
        self.recent = recent
        self.key: Tensor | None = None
        self.value: Tensor | None = None


@contextmanager
def split_attention(model: Any, recent: int) -> Iterator[FarTaps]:
    """Within the block, layers run with gradients leave their far keys and values in the yielded taps.

    recent: keys at most this many tokens back are near, seen exactly; a token always sees itself exactly.
    """
    taps = FarTaps(recent)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
            return output
        taps.key, taps.value = key.clone(), value.clone()
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return near_far_attention(query * scaling, (key, taps.key), (value, taps.value), mask, recent), None

    before = use_attention(model, ATTENTION_NAME, attention)
    try:
        yield taps
    finally:
        model.set_attn_implementation(before)


def near_far_attention(
    query: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], mask: Tensor | None, recent: int
) -> Tensor:
    """Return causal attention [1, n_tokens, heads, head_dim], near keys and values from the first of each pair.

    query: [1, heads, n_tokens, head_dim], scaled; keys, values: (near, far), each [1, kv heads, n_tokens, head_dim];
    mask: bool [1, 1, n_tokens, n_tokens] or None for plain causal.
    """
    _, n_heads, n_tokens, head_dim = query.shape
    n_kv_heads = keys[0].shape[1]
    groups = n_heads // n_kv_heads
    rows = query.reshape(n_kv_heads, groups, n_tokens, head_dim)
    (near_key, far_key), (near_value, far_value) = ([x[0] for x in pair] for pair in (keys, values))
    # Both are zero: adding them moves the gradient of near queries from the far leaf to the near one.
    key_shift, value_shift = near_key - far_key, near_value - far_value
    place = torch.arange(n_tokens, device=query.device)
    outputs = []
    for start in range(0, n_tokens, _QUERIES):
        stop = min(start + _QUERIES, n_tokens)
        low = max(0, start - recent)  # the first key that is near to any of these queries
        distance = place[start:stop, None] - place[None, :stop]
        near = (distance <= recent)[:, low:].repeat(groups, 1)
        visible = distance >= 0 if mask is None else mask[0, 0, start:stop, :stop]
        chunk = rows[:, :, start:stop].reshape(n_kv_heads, -1, head_dim)
        scores = chunk @ far_key[:, :stop].transpose(1, 2)
        scores[..., low:] += near * (chunk @ key_shift[:, low:stop].transpose(1, 2))
        weights = scores.masked_fill(~visible.repeat(groups, 1), float("-inf")).softmax(-1, dtype=torch.float32)
        weights = weights.to(query.dtype)
        chunk_output = weights @ far_value[:, :stop] + (near * weights[..., low:]) @ value_shift[:, low:stop]
        outputs.append(chunk_output.reshape(n_kv_heads, groups, stop - start, head_dim))
    return torch.cat(outputs, 2).reshape(1, n_heads, n_tokens, head_dim).transpose(1, 2)
