"""Attention that tells apart what a query sees exactly and what it would see compressed.

The Fisher information of a cached key or value must count only the queries that will read it compressed: those
at least a recent window away. Here near and far keys are separate leaves of the autograd graph with equal values,
so the gradient of the far ones is taken alone, while the layers below still receive the whole gradient.

Both ways are written out, some queries at a time, with their weights computed again on the way back: as a graph of
small steps it was a thousand launches a layer, which kept a GPU waiting, and all weights of a window in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvcompress.calibration.fused_attention import FusedNearFar, is_fused
from kvcompress.model.recording import capped

#: Queries at once: on a processor as many as have weights that stay in its cache.
_ON_A_CPU, _ON_A_GPU = 64, 512


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

    query: [1, heads, n_tokens, head_dim], scaled; keys, values: (near, far), each [1, kv heads, n_tokens, width], of
    equal numbers; mask: bool or additive [1, 1 or heads, n_tokens, n_tokens], or None for plain causal. softcap, s_aux:
    see plain_attention. Gradients reach query, keys and values.
    """
    if mask is None and softcap is None and s_aux is None and is_fused(query, keys[1], values[1]):
        fused: Tensor = FusedNearFar.apply(query, *keys, *values, recent)
        return fused
    scoring = _Scoring(mask, softcap, None if s_aux is None else s_aux.detach(), recent)
    found: Tensor = _NearFar.apply(query, *keys, *values, scoring)
    return found


class _Scoring:
    """How scores become weights, some queries at a time."""

    def __init__(self, mask: Tensor | None, softcap: float | None, s_aux: Tensor | None, recent: int) -> None:
        self.mask, self.softcap, self.s_aux, self.recent = mask, softcap, s_aux, recent

    def weights(self, rows: Tensor, key: Tensor, start: int, groups: int) -> tuple[Tensor, Tensor]:
        """Return (capped scores, float32 weights) of queries from `start` on: [kv heads, groups * queries, keys]."""
        stop = key.shape[1]
        scores = capped(rows @ key.transpose(1, 2), self.softcap)
        by_head = scores.view(len(scores), groups, stop - start, stop)
        if self.mask is None:
            masked = by_head.masked_fill(_beyond(start, stop, -1, rows.device, later=True), float("-inf"))
        else:
            visible = self.mask[0, :, start:stop, :stop]
            if len(visible) > 1:
                visible = visible.view(*by_head.shape)
            is_bool = visible.dtype == torch.bool
            masked = by_head.masked_fill(~visible, float("-inf")) if is_bool else by_head + visible
        return scores, _softmax(masked.view(scores.shape), self.s_aux, groups)


@lru_cache(maxsize=64)  # the same for every layer
def _beyond(start: int, stop: int, distance: int, device: torch.device, *, later: bool = False) -> Tensor:
    """Return which keys lie more than a distance before queries start to stop, [n_queries, n_keys], or `later` ones."""
    place = torch.arange(stop, device=device)
    away = place[start:, None] - place
    return away <= distance if later else away > distance


class _NearFar(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, _near: Tensor, key: Tensor, _nearer: Tensor, value: Tensor, scoring: _Scoring
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scoring = scoring
        outputs = []
        for start, stop, rows in _chunks(query, key):
            _, weights = scoring.weights(rows, key[0, :, :stop], start, query.shape[1] // key.shape[1])
            outputs.append(_by_head(weights.to(query.dtype) @ value[0, :, :stop], query))
        return torch.cat(outputs, 1).transpose(0, 1)[None].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The textbook's gradients, those of near and of far queries apart; sums over queries in float32."""
        query, key, value = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        sums = [
            torch.zeros_like(t[0], dtype=torch.promote_types(t.dtype, torch.float32)) for t in (key, key, value, value)
        ]
        queries = []
        for (start, stop, rows), (_, _, grads) in zip(
            _chunks(query, key), _chunks(gradient.transpose(1, 2), key), strict=True
        ):
            scores, weights = ctx.scoring.weights(rows, key[0, :, :stop], start, groups)
            far = _beyond(start, stop, ctx.scoring.recent, query.device)
            slope = (grads @ value[0, :, :stop].transpose(1, 2)).to(weights.dtype)
            slope = (slope - (slope * weights).sum(-1, keepdim=True)).mul_(weights)
            if ctx.scoring.softcap is not None:
                slope *= 1 - (scores / ctx.scoring.softcap).square()
            slope = slope.to(query.dtype)
            queries.append(_by_head(slope @ key[0, :, :stop], query))
            low = max(0, start - ctx.scoring.recent)  # the first key that is near to any of these queries
            _add_both(sums[:2], slope, rows, far, low)
            _add_both(sums[2:], weights.to(value.dtype), grads, far, low)
        near_key, far_key, near_value, far_value = (s.to(key.dtype)[None] for s in sums)
        return torch.cat(queries, 1)[None], near_key, far_key, near_value, far_value, None


def _chunks(query: Tensor, key: Tensor) -> Any:
    """Yield (start, stop, [kv heads, groups * queries, width]) of some queries at a time."""
    n_kv_heads, n_tokens = key.shape[1], query.shape[2]
    rows = query.reshape(n_kv_heads, -1, n_tokens, query.shape[3])
    at_once = _ON_A_GPU if query.is_cuda else _ON_A_CPU
    for start in range(0, n_tokens, at_once):
        stop = min(start + at_once, n_tokens)
        yield start, stop, rows[:, :, start:stop].reshape(n_kv_heads, -1, query.shape[3])


def _by_head(rows: Tensor, query: Tensor) -> Tensor:
    """[kv heads, groups * queries, width] -> [heads, queries, width]."""
    return rows.reshape(query.shape[1], -1, rows.shape[2])


def _add_both(sums: list[Tensor], weights: Tensor, rows: Tensor, far: Tensor, low: int) -> None:
    """Add weights^T @ rows to the (near, far) sums, by which of the keys a query is; `weights` is used up."""
    n_queries, stop = far.shape
    by_head = weights.view(len(weights), -1, n_queries, stop)[..., low:]
    near = by_head.masked_fill(far[:, low:], 0).flatten(1, 2)
    sums[0][:, low:stop] += near.transpose(1, 2) @ rows
    by_head.masked_fill_(~far[:, low:], 0)
    sums[1][:, :stop] += weights.transpose(1, 2) @ rows


def _softmax(scores: Tensor, s_aux: Tensor | None, groups: int) -> Tensor:
    """Return the weights of the keys, float32; s_aux: [heads], a further score that takes weight from them."""
    if s_aux is None:
        return scores.softmax(-1, dtype=torch.float32)
    n_kv_heads, n_rows, n_keys = scores.shape
    aside = s_aux.reshape(n_kv_heads, groups, 1).expand(-1, -1, n_rows // groups).reshape(n_kv_heads, n_rows, 1)
    return torch.cat([scores, aside.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)[..., :n_keys]
