"""Gradients through linear layers that cut them: those that quantise what comes in (FP8 or int8 activations) do so in
steps that have none.

What a step of rounding passes on is taken to be what it got, the straight-through estimator (arXiv 1308.3432), so the
gradient goes through the weights alone, as it does where transformers itself computes in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Weights that say what they are; those of 8 bits have scales beside them.
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """Within the block, linear layers of a model with quantised weights pass gradients on even where they round."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)] if getattr(model, "is_quantized", False) else []
    handles = [layer.register_forward_hook(_bridged) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bridged(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output of a linear layer, as one that depends on its input."""
    x, weight = args[0] if args else None, getattr(layer, "weight", None)
    if not isinstance(x, Tensor) or not x.requires_grad or output.requires_grad or not torch.is_grad_enabled():
        return output
    if weight is None or weight.dtype not in _PLAIN or weight.shape != (output.shape[-1], x.shape[-1]):
        return output
    return _Bridge.apply(x, output, weight)


class _Bridge(torch.autograd.Function):
    """Numbers computed without gradients, with the gradient of x [..., d_in] through weight [d_out, d_in]."""

    @staticmethod
    def forward(ctx: Any, _x: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weight.to(gradient.dtype), None, None
