"""Caches that store every token and head by itself, as engines do: a format turns a head's vector into bytes and back.

Each family has a file of its own, with its paper. Codes are really packed, so that bytes are counted from storages.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kvcompress.compat import DynamicLayer
from kvcompress.model.model_spec import Part


class TokenFormat(Protocol):
    """How one token's vector of one head is stored, keys (after RoPE) and values each in their way."""

    def encode(self, x: Tensor, part: Part) -> tuple[Tensor, ...]:
        """x: [..., head_dim], float32 -> what is stored, every tensor [..., some width]."""

    def decode(self, stored: tuple[Tensor, ...], part: Part, head_dim: int) -> Tensor:
        """Return what attention reads: [..., head_dim], float32."""

    def head_bytes(self, head_dim: int) -> int:
        """Return the bytes of one token's key and value of one head. Raises OptionError where there is no such."""


class TokenLayer(DynamicLayer):
    """A cache layer in a format: every query sees every token as it is stored, itself included."""

    def __init__(self, form: TokenFormat) -> None:
        super().__init__()
        self.form = form
        self.stored: dict[Part, tuple[Tensor, ...]] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.head_dims: dict[Part, int] = {"key": key_states.shape[-1], "value": value_states.shape[-1]}
        # never filled: what transformers asks for a length
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.stored["key"][0].shape[2] if self.stored else 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._added("key", key_states), self._added("value", value_states)

    def _added(self, part: Part, states: Tensor) -> Tensor:
        new = self.form.encode(states.float(), part)
        old = self.stored.get(part)
        self.stored[part] = new if old is None else tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
        return self.form.decode(self.stored[part], part, self.head_dims[part]).to(self.dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [..., n], whole numbers below 2^bits -> uint8 [..., ceil(n * bits / 8)], lowest bits first."""
    shifts = torch.arange(bits, device=codes.device)
    flat = ((codes.long().unsqueeze(-1) >> shifts) & 1).flatten(-2).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the n codes of `pack`, [..., n], int64."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : n * bits].unflatten(-1, (n, bits)).long()
    return (flat << torch.arange(bits, device=packed.device)).sum(-1)
