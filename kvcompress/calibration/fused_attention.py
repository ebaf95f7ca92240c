"""Near and far keys apart by torch's fused attention: a few kernels where the steps of attention.py are hundreds.

A fused backward makes weights anew from the scores and the log of their sum, which it is given. So what far keys get is
had by a second call of it, in which queries are moved by the window: query t + recent + 1 stands in the place of query
t, whose causal keys 0 to t are those that it sees compressed, with the sums and outputs of its own whole attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_OPS = torch.ops.aten
#: Widths of heads that the kernels' way back takes on every GPU that has them.
_WIDEST, _STEP = 128, 8
#: The first GPUs that have them.
_CAPABILITY = (8, 0)


def is_fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether plain causal attention of these is fused: [1, heads, n_tokens, width] each, of one width."""
    same = query.shape[2:] == key.shape[2:] == value.shape[2:] and query.dtype == key.dtype == value.dtype
    if not same or not query.is_cuda:
        return same and query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    fits = query.shape[3] <= _WIDEST and query.shape[3] % _STEP == 0
    is_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return fits and is_16_bits and torch.cuda.get_device_capability(query.device) >= _CAPABILITY


class FusedNearFar(torch.autograd.Function):
    """Causal attention of query, (near, far) keys and (near, far) values, as attention.near_far_attention has them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, _near: Tensor, key: Tensor, _nearer: Tensor, value: Tensor, recent: int
    ) -> Tensor:
        output, *sums = _forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.recent = recent
        return output.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums, *drawn = ctx.saved_tensors
        gradient = gradient.transpose(1, 2)
        for_query, *whole = _backward(gradient, query, key, value, output, sums, drawn)
        away, n = ctx.recent + 1, query.shape[2]
        if n <= away:
            far = [torch.zeros_like(t) for t in whole]
        else:
            late = [t[:, :, away:].contiguous() for t in (gradient, query, output, sums)]
            old = [t[:, :, : n - away].contiguous() for t in (key, value)]
            found = _backward(late[0], late[1], old[0], old[1], late[2], late[3], drawn)
            far = [functional.pad(t, (0, 0, 0, away)) for t in found[1:]]
        (near_key, near_value), (far_key, far_value) = [w - f for w, f in zip(whole, far, strict=True)], far
        return for_query, near_key, far_key, near_value, far_value, None


def _forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return (output [1, heads, n_tokens, width], logs of the sums of a query's exponential scores, and what a GPU
    wants back of what it has drawn, which is nothing)."""
    if query.is_cuda:
        found = _OPS._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=1.0)
        return found[0], found[1], found[6], found[7]
    by_head = (_of_each_head(t, query) for t in (key, value))
    output, sums = _OPS._scaled_dot_product_flash_attention_for_cpu(query, *by_head, 0.0, True, scale=1.0)
    return output, sums


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, drawn: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, keys and values; sums and drawn: as `_forward` returned them."""
    n = query.shape[2]
    if query.is_cuda:
        back = _OPS._scaled_dot_product_flash_attention_backward
        with _reproducible():
            found = back(gradient, query, key, value, output, sums, None, None, n, n, 0.0, True, *drawn, scale=1.0)
        return found[0], found[1], found[2]
    by_head = (_of_each_head(t, query) for t in (key, value))
    back = _OPS._scaled_dot_product_flash_attention_for_cpu_backward
    found = back(gradient, query, *by_head, output, sums, 0.0, True, scale=1.0)
    groups = query.shape[1] // key.shape[1]
    for_key, for_value = (t.unflatten(1, (-1, groups)).sum(2) for t in found[1:])
    return found[0], for_key, for_value


@contextmanager
def _reproducible() -> Iterator[None]:
    """Within the block kernels add up in one order, so that a calibration gives the same sums again."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _of_each_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Return keys or values [1, kv heads, ...] repeated for each query head."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, 1)
