"""vLLM's `int8_per_token_head` and `fp8_per_token_head`: 8 bits a number, a float32 scale for each vector.

No paper of their own: the largest number of a head's vector sets its scale, as in LLM.int8 (arXiv 2208.07339) a row's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.model.model_spec import Part

_LEAST_SCALE = 1e-6


@dataclass(frozen=True, slots=True)
class PerTokenHead:
    """8-bit numbers of a dtype, int8 or float8_e4m3fn, with a scale of their own for each vector."""

    dtype: torch.dtype

    def encode(self, x: Tensor, part: Part) -> tuple[Tensor, ...]:
        """Return the numbers and their scale; vLLM rounds half away from zero where numbers are whole."""
        whole = not self.dtype.is_floating_point
        largest = float(torch.iinfo(self.dtype).max if whole else torch.finfo(self.dtype).max)
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(_LEAST_SCALE)
        scaled = x / scale
        if whole:
            scaled = (scaled.abs() + 0.5).floor() * scaled.sign()
        return scaled.clamp(-largest, largest).to(self.dtype), scale

    def decode(self, stored: tuple[Tensor, ...], part: Part, head_dim: int) -> Tensor:
        numbers, scale = stored
        return numbers.float() * scale

    def head_bytes(self, head_dim: int) -> int:
        return 2 * (head_dim + 4)


FORMATS = {"int8": PerTokenHead(torch.int8), "fp8": PerTokenHead(torch.float8_e4m3fn)}
