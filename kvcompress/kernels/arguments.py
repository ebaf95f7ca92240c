"""What decode.packed_attention takes besides the packed sites: exact tokens, positions, launch parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExactTokens:
    """What is kept beside the packed tokens, in the model's dtype: [batch, kv heads, n_tokens, head_dim] each.

    The last n_queries of `keys` and `values` are the queries' own. mask: [batch, n_sinks + n_recent] uint8, 0 where
    a token must not be seen, or None.
    """

    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedPages:
    """Where packed rows lie in pages. rows: [batch] int32, each query's row of `table` [rows, most pages] int32."""

    rows: Tensor
    table: Tensor


@dataclass(frozen=True, slots=True)
class Angles:
    """RoPE of the packed tokens, where their keys have a mean. table: of `angle_table`; origin: [batch] int32, the
    packed token at position 0 of each sequence, so that token t has position t - origin."""

    table: Tensor
    origin: Tensor


def angle_table(inv_freq: Tensor, n_positions: int, *, scale: float = 1.0) -> Tensor:
    """Return scale * (cos, sin) of every position, zeros up to a multiple of 32: [n_positions, ...] float16."""
    angles = torch.arange(n_positions, device=inv_freq.device)[:, None] * inv_freq.double()
    table = (torch.cat([angles.cos(), angles.sin()], 1) * scale).half()
    return torch.nn.functional.pad(table, (0, -table.shape[1] % 32))


@dataclass(frozen=True, slots=True)
class Tuning:
    """Launch parameters; the defaults were the fastest of those in docs/speed.md."""

    tile_blocks: int = 8
    prepare_tokens: int = 64
    prepare_warps: int = 8
    score_warps: int = 2
    score_width: int = 32
    score_stages: int = 4
    value_width: int = 128
    value_warps: int = 4
    value_blocks: int = 4
    value_stages: int = 3
    value_registers: int = 128
    value_programs: int = 3  # for each multiprocessor
    output_width: int = 256
    output_warps: int = 8


#: For float16 latents, which need no unpacking.
RANKS_TUNING = Tuning(value_stages=4, value_registers=168, value_programs=2, output_width=512)
DEFAULT_TUNING = Tuning()
