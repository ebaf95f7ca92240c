"""Attention that tells apart what a query sees exactly and what it would see compressed.

The Fisher information of a cached key or value must count only the queries that will read it compressed: those
at least a recent window away. Here near and far keys are separate leaves of the autograd graph with equal values,
so the gradient of the far ones is taken alone, while the layers below still receive the whole gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.model.recording import capped

_QUERIES = 256


def near_far_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None,
    recent: int,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Return causal attention [1, n_tokens, heads, width], near keys and values from the first of each pair.

    query: [1, heads, n_tokens, head_dim], scaled; keys, values: (near, far), each [1, kv heads, n_tokens, width];
    mask: bool or additive [1, 1 or heads, n_tokens, n_tokens], or None for plain causal. softcap, s_aux: see
    plain_attention.
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
        visible = (distance >= 0)[None, None] if mask is None else mask[:1, :, start:stop, :stop]
        chunk = rows[:, :, start:stop].reshape(n_kv_heads, -1, head_dim)
        scores = chunk @ far_key[:, :stop].transpose(1, 2)
        scores[..., low:] += near * (chunk @ key_shift[:, low:stop].transpose(1, 2))
        scores = _masked(capped(scores, softcap), visible, groups)
        weights = _softmax(scores, s_aux, groups).to(query.dtype)
        chunk_output = weights @ far_value[:, :stop] + (near * weights[..., low:]) @ value_shift[:, low:stop]
        outputs.append(chunk_output.reshape(n_kv_heads, groups, stop - start, -1))
    return torch.cat(outputs, 2).reshape(1, n_heads, n_tokens, -1).transpose(1, 2).contiguous()


def _masked(scores: Tensor, visible: Tensor, groups: int) -> Tensor:
    """scores: [kv heads, groups * n_queries, n_keys]; visible: bool or additive [1, 1 or heads, n_queries, n_keys]."""
    n_kv_heads, n_rows, n_keys = scores.shape
    by_head = visible.expand(1, n_kv_heads * groups, -1, -1).reshape(n_kv_heads, n_rows, n_keys)
    if by_head.dtype == torch.bool:
        return scores.masked_fill(~by_head, float("-inf"))
    return scores + by_head


def _softmax(scores: Tensor, s_aux: Tensor | None, groups: int) -> Tensor:
    """Return the weights of the keys, float32; s_aux: [heads], a further score that takes weight from them."""
    if s_aux is None:
        return scores.softmax(-1, dtype=torch.float32)
    n_kv_heads, n_rows, n_keys = scores.shape
    aside = s_aux.reshape(n_kv_heads, groups, 1).expand(-1, -1, n_rows // groups).reshape(n_kv_heads, n_rows, 1)
    return torch.cat([scores, aside.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)[..., :n_keys]
