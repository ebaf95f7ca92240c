"""Packed storage of codes: blocks of 32 tokens, component after component, without gaps (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.plan import BLOCK_TOKENS


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 [batch, n_blocks, C * 4 * bits] of codes [batch, n_blocks * 32, C].

    Up to 8 bits: integers 0..2^bits - 1 in any dtype; 16 and 32 bits: the numbers themselves, as float16 or float32.
    Component c of a block takes 4 * bits bytes; token t lies at bit t * bits of them, the lowest bit first.
    """
    batch, n_tokens, n_components = codes.shape
    blocks = codes.reshape(batch, n_tokens // BLOCK_TOKENS, BLOCK_TOKENS, n_components).transpose(2, 3)
    if bits >= 16:
        numbers = blocks.to(torch.float16 if bits == 16 else torch.float32).contiguous()
        return numbers.view(torch.uint8).flatten(2)
    per_byte = 8 // bits
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    together = blocks.to(torch.uint8).unflatten(3, (BLOCK_TOKENS // per_byte, per_byte)) << shifts
    return together.sum(-1, dtype=torch.uint8).flatten(2)


def unpack_codes(packed: Tensor, bits: int, into: Tensor) -> None:
    """Write the codes of what pack_codes gave into a float32 tensor [batch, n_blocks * 32, C] or a view of one."""
    batch, n_blocks, _ = packed.shape
    n_components = into.shape[2]
    if bits >= 16:
        dtype = torch.float16 if bits == 16 else torch.float32
        codes = packed.contiguous().view(dtype)
    else:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    by_component = codes.reshape(batch, n_blocks, n_components, BLOCK_TOKENS)
    into.unflatten(1, (n_blocks, BLOCK_TOKENS)).copy_(by_component.transpose(2, 3))
