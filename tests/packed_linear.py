"""A linear layer as kernels for packed weights have it: integers and scales in buffers, no way back for gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Packed(nn.Module):
    """The layer given, its weights in 8 bits."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scales = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("codes", (plain.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach().clone())

    def weights(self) -> Tensor:
        return self.codes.to(self.scales.dtype) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, self.weights(), self.bias)
