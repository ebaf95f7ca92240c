"""RMSNorm of every head's output before the output projection: GroupNorm of arXiv 2601.19611, Eq. 12.

The paper takes it from the Differential Transformer: a learned weight for each number, a division by the root mean
square of each head's own output. The division depends on the token, so no engine's plain attention can take it up;
the weight alone could be folded into o_proj. Weights begin as the root mean square that each head's output has on
text, so that a model that was trained without the norm changes as little as it can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: The name of the module on an attention module, and of its weight in a checkpoint.
HEAD_NORM = "head_norm"
_EPSILON = 1e-6


class HeadNorm(nn.Module):
    """x: [..., heads * head_dim] -> the same, each head divided by its root mean square, times the weight."""

    def __init__(self, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_heads, head_dim))
        self.passes_through = False  # while a training measures what there was before

    def forward(self, x: Tensor) -> Tensor:
        if self.passes_through:
            return x
        heads = x.unflatten(-1, self.weight.shape).float()
        normed = heads * (heads.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
        return (normed * self.weight.float()).flatten(-2).to(x.dtype)


def add_head_norm(attention: Any, *, n_heads: int, head_dim: int) -> HeadNorm:
    """Put a norm between an attention module's heads and its o_proj, and return it."""
    norm = HeadNorm(n_heads, head_dim).to(attention.o_proj.weight)
    setattr(attention, HEAD_NORM, norm)
    attention.o_proj.register_forward_pre_hook(lambda _module, args: (norm(args[0]), *args[1:]))
    return norm
