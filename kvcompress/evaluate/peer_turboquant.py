"""vLLM's TurboQuant presets (after Zandieh et al., TurboQuant, arXiv 2504.19874; the idea of DRIVE, NeurIPS 2021, and
HIGGS, arXiv 2411.17525), as vLLM 0.32 has them (`--kv-cache-dtype turboquant_4bit_nc`).

Keys: the norm apart in 16 bits, the unit vector rotated by a Hadamard matrix, each coordinate coded with the Lloyd-Max
levels of N(0, 1 / head_dim); `nc` renormalises what is decoded. `k8v4` keeps keys in e4m3, without a scale. Values:
uniform codes between a token's least and largest number, scale and least in 16 bits. vLLM leaves the first and the last
two layers exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.evaluate.token_formats import pack, unpack
from kvcompress.model.model_spec import Part

#: Layers at each end that vLLM keeps exact.
EXACT_LAYERS = 2
_FP8 = torch.float8_e4m3fn
#: Where the Lloyd-Max iteration of vLLM starts and integrates, in standard deviations.
_SPAN = 3.5


@dataclass(frozen=True, slots=True)
class TurboQuant:
    """A preset: bits of keys (8: e4m3, no rotation) and of values; whether decoded keys are renormalised."""

    key_bits: int
    value_bits: int
    renormalised: bool = True

    def encode(self, x: Tensor, part: Part) -> tuple[Tensor, ...]:
        if part == "value":
            return self._encode_value(x)
        if self.key_bits == 8:
            largest = torch.finfo(_FP8).max
            return (x.clamp(-largest, largest).to(_FP8),)
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / (norm + 1e-8) @ hadamard(x.shape[-1]).to(x.device)
        levels = lloyd_max(x.shape[-1], self.key_bits).to(x.device)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
        return pack(codes, self.key_bits), norm.half()

    def decode(self, stored: tuple[Tensor, ...], part: Part, head_dim: int) -> Tensor:
        if part == "value":
            packed, scale, low = stored
            return unpack(packed, self.value_bits, head_dim) * scale.float() + low.float()
        if self.key_bits == 8:
            return stored[0].float()
        packed, norm = stored
        unit = lloyd_max(head_dim, self.key_bits).to(packed.device)[unpack(packed, self.key_bits, head_dim)]
        if self.renormalised:
            unit = unit / unit.norm(dim=-1, keepdim=True)
        return norm.float() * (unit @ hadamard(head_dim).to(packed.device))

    def head_bytes(self, head_dim: int) -> int:
        """Codes of key and value, the key's norm, the value's scale and least number; an even number of bytes."""
        if head_dim & (head_dim - 1):
            raise OptionError(f"TurboQuant needs a head_dim that is a power of two, found {head_dim}.")
        key = head_dim if self.key_bits == 8 else math.ceil(head_dim * self.key_bits / 8) + 2
        return key + math.ceil(head_dim * self.value_bits / 8) + 4

    def _encode_value(self, x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.value_bits - 1)).clamp_min(1e-8)
        codes = ((x - low) / scale + 0.5).floor().clamp(0, 2**self.value_bits - 1)
        return pack(codes, self.value_bits), scale.half(), low.half()


@lru_cache
def hadamard(n: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of n = 2^k, scaled to be orthogonal; it is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


@lru_cache
def lloyd_max(head_dim: int, bits: int) -> Tensor:
    """Return the 2^bits levels of least squared error for N(0, 1 / head_dim), rising: [2^bits], float32."""
    levels = (torch.arange(2**bits, dtype=torch.float64) + 0.5) * (2 * _SPAN / 2**bits) - _SPAN
    edge = torch.full((1,), math.inf, dtype=torch.float64)
    for _ in range(2000):
        bounds = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
        density = torch.exp(-bounds.square() / 2) / (2 * math.pi) ** 0.5
        mass = torch.special.ndtr(bounds).diff()
        moved = -density.diff() / mass
        done = float((moved - levels).abs().max()) < 1e-10
        levels = moved
        if done:
            break
    return (levels / head_dim**0.5).float()


PRESETS = {
    "k8v4": TurboQuant(8, 4, renormalised=False),
    "4bit_nc": TurboQuant(4, 4),
    "k3v4_nc": TurboQuant(3, 4),
    "3bit_nc": TurboQuant(3, 3),
}
