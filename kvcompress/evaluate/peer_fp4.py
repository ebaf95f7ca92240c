"""Four-bit floating point (E2M1) with scales of small groups, as hardware multiplies it.

NVFP4 (NVIDIA, arXiv 2509.25149; vLLM's `nvfp4`): a scale in e4m3 for 16 neighbouring numbers, one float32 scale for
all, here vLLM's default of 1. UltraQuant (vLLM's `ultraquant_4bit`): a power of two for 32 neighbours, as in the
OCP's MX formats (arXiv 2310.10537), keys rotated by a Hadamard matrix first; vLLM leaves the first and the last two
layers exact there, too. (It also rounds queries to e4m3 before they meet rotated keys, which is left out here.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.evaluate.peer_turboquant import hadamard
from kvcompress.evaluate.token_formats import pack, unpack
from kvcompress.model.model_spec import Part

_LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP8 = torch.float8_e4m3fn
#: UltraQuant's scale for the largest number of a group, before it is rounded to a power of two.
_SCALE_OF_LARGEST = 0.156


@dataclass(frozen=True, slots=True)
class Fp4:
    """E2M1 codes in groups; the scale of a group is in e4m3, or a power of two (one byte either way)."""

    group: int
    power_of_two: bool
    rotates_keys: bool

    def encode(self, x: Tensor, part: Part) -> tuple[Tensor, ...]:
        if part == "key" and self.rotates_keys:
            x = x @ hadamard(x.shape[-1]).to(x.device)
        groups = x.unflatten(-1, (-1, self.group))
        scale, stored = self._scales(groups.abs().amax(-1, keepdim=True))
        levels = _LEVELS.to(x.device)
        size = torch.bucketize((groups / scale).abs(), (levels[1:] + levels[:-1]) / 2)
        codes = (size + 8 * (groups < 0)).flatten(-2)
        return pack(codes, 4), stored.squeeze(-1)

    def decode(self, stored: tuple[Tensor, ...], part: Part, head_dim: int) -> Tensor:
        packed, scales = stored
        codes = unpack(packed, 4, head_dim)
        x = _LEVELS.to(packed.device)[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
        scale = torch.exp2(scales.float() - 127) if self.power_of_two else scales.float()
        x = (x.unflatten(-1, (-1, self.group)) * scale.unsqueeze(-1)).flatten(-2)
        return x @ hadamard(head_dim).to(x.device) if part == "key" and self.rotates_keys else x

    def head_bytes(self, head_dim: int) -> int:
        if head_dim % self.group or head_dim & (head_dim - 1):
            raise OptionError(f"FP4 in groups of {self.group} needs a head_dim of 2^k of them, found {head_dim}.")
        return 2 * (head_dim // 2 + head_dim // self.group)

    def _scales(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scales as they are read, as they are stored); largest: [..., 1] of each group."""
        if self.power_of_two:
            exponent = (_SCALE_OF_LARGEST * largest).clamp_min(2.0**-126).log2().round().clamp(-126, 127)
            return torch.exp2(exponent), (exponent + 127).to(torch.uint8)
        stored = (largest / 6).clamp(2.0**-9, torch.finfo(_FP8).max).to(_FP8)
        return stored.float(), stored


FORMATS = {
    "nvfp4": Fp4(16, power_of_two=False, rotates_keys=False),
    "ultraquant": Fp4(32, power_of_two=True, rotates_keys=True),
}
