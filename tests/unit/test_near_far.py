"""Attention whose near and far keys are apart: the gradients of a plain graph, whatever the queries' pieces are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.calibration import attention

RECENT = 8


def plain(query: Tensor, keys: Any, values: Any, mask: Tensor | None, *, softcap: Any = None, s_aux: Any = None) -> Any:
    """The same in one piece, near and far keys chosen score by score, in the dtype of the query."""
    groups, n = query.shape[1] // keys[0].shape[1], query.shape[2]
    (near_key, far_key), (near_value, far_value) = ([t.repeat_interleave(groups, 1) for t in p] for p in (keys, values))
    distance = torch.arange(n)[:, None] - torch.arange(n)
    is_near = distance <= RECENT
    scores = torch.where(is_near, query @ near_key.transpose(2, 3), query @ far_key.transpose(2, 3))
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    visible = distance >= 0 if mask is None else mask
    scores = scores.masked_fill(~visible, float("-inf")) if visible.dtype == torch.bool else scores + visible
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(-1, -1, n, 1)], -1)
    weights = scores.softmax(-1)[..., :n]
    return ((weights * is_near) @ near_value + (weights * ~is_near) @ far_value).transpose(1, 2)


@pytest.mark.parametrize("n_queries", [7, 16, 64])
@pytest.mark.parametrize("case", ["causal", "window", "additive", "softcap", "sinks", "one head each"])
def test_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch, case: str, n_queries: int) -> None:
    monkeypatch.setattr(attention, "_ON_A_CPU", n_queries)
    torch.manual_seed(0)
    n, heads, kv_heads = 50, 8, 8 if case == "one head each" else 2
    how: dict[str, Any] = {"softcap": {"softcap": 3.0}, "sinks": {"s_aux": torch.randn(heads).double()}}.get(case, {})
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    mask = {"window": causal.triu(-20)[None, None], "additive": torch.zeros(1, 1, n, n).double()}.get(case)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.masked_fill(~causal, torch.finfo(torch.float64).min)
    query, key, value = (torch.randn(1, h, n, w).double() for h, w in ((heads, 12), (kv_heads, 12), (kv_heads, 20)))
    gradient, found = torch.randn(1, n, heads, 20).double(), []
    for attend in (lambda *a, **k: attention.near_far_attention(*a, RECENT, **k), plain):
        leaves = [t.clone().requires_grad_(True) for t in (query, key, key, value, value)]
        output = attend(leaves[0], leaves[1:3], leaves[3:], mask, **how)
        found.append([output, *torch.autograd.grad(output, leaves, gradient)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float64 and float(expected.detach().norm()) > 0
        assert torch.allclose(
            ours, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max())
        )  # softmax: float32


@pytest.mark.parametrize("recent", [0, RECENT, 60])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_fused_way_is_the_same(kv_heads: int, recent: int) -> None:
    """Plain causal attention goes through torch's fused kernels, whose gradients are those of the steps."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 50, 16).double() for h in (8, kv_heads, kv_heads))
    gradient, found = torch.randn(1, 50, 8, 16).double(), []
    causal = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    for mask in (None, causal):  # with a mask it is the steps
        leaves = [t.clone().requires_grad_(True) for t in (query, key, key, value, value)]
        output = attention.near_far_attention(leaves[0], leaves[1:3], leaves[3:], mask, recent)
        assert (type(output.grad_fn).__name__ == "FusedNearFarBackward") == (mask is None)
        found.append([output, *torch.autograd.grad(output, leaves, gradient)])
    for ours, expected in zip(*found, strict=True):
        ours, expected = ours.detach(), expected.detach()
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + 1e-12
    far = found[0][3]  # of keys, of which the last ones are seen by none as far
    assert not far[:, :, 50 - recent - 1 :].any() and (recent > 49 or bool(far[:, :, 0].any()))


def test_other_widths_of_values_are_not_fused() -> None:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    assert attention.is_fused(query, key, key)
    assert not attention.is_fused(query, key, torch.randn(1, 2, 6, 4))
    assert not attention.is_fused(query.half(), key.half(), key.half())  # on a CPU
