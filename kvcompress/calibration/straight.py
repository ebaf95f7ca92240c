"""Gradients through linear layers that cut them: those that quantise what comes in (FP8 or int8 activations) do so in
steps that have none, and kernels for packed weights (AWQ, GPTQ) have no way back.

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
#: Columns of packed weights that are made out at once.
_COLUMNS = 1024


@contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """Within the block, linear layers of a model with quantised weights pass gradients on even where they round."""
    layers = filter(_says_its_sizes, model.modules()) if getattr(model, "is_quantized", False) else ()
    handles = [layer.register_forward_hook(_bridged) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _says_its_sizes(module: nn.Module) -> bool:
    """Return whether a module is a linear layer by its names: packed weights have classes of their own (AWQ, GPTQ)."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _bridged(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output of a linear layer, as one that depends on its input."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.requires_grad or output.requires_grad or not torch.is_grad_enabled():
        return output
    if output.shape[:-1] != x.shape[:-1]:
        return output
    return _Bridge.apply(x, output, layer)


class _Bridge(torch.autograd.Function):
    """Numbers computed without gradients, with the gradient of x [..., d_in] through a weight [d_out, d_in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.d_in, ctx.dtype = layer, x.shape[-1], x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = getattr(ctx.layer, "weight", None)
        if weight is not None and weight.dtype in _PLAIN and weight.shape == (gradient.shape[-1], ctx.d_in):
            return gradient @ weight.to(gradient.dtype), None, None
        parts = [gradient @ w.to(gradient.dtype) for w in _columns(ctx.layer, ctx.d_in, ctx.dtype, gradient.device)]
        return torch.cat(parts, -1), None, None


def _columns(layer: nn.Module, d_in: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Yield the weight of a layer, [d_out, columns], however it is packed: what it makes of unit vectors."""
    with torch.no_grad():
        bias = layer.forward(torch.zeros(1, d_in, dtype=dtype, device=device))
        for start in range(0, d_in, _COLUMNS):
            units = torch.eye(min(_COLUMNS, d_in - start), d_in, dtype=dtype, device=device).roll(start, 1)
            yield (layer.forward(units) - bias).T
