"""Decode attention over the packed cache: four Triton launches, from queries to outputs.

1. prepare_kernel: the key decoder goes into the query; attention over sinks and recent tokens. 2. score_kernel: softmax
weights of all packed tokens, relative to their tile. 3. value_kernel: weighted sums of value codes. 4. output_kernel:
splits added up, decoded, joined with the exact tokens. docs/speed.md says why it is two passes and not one.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.runtime.kernels.layout import LEVELS, PackedSite, offsets
from kvcompress.runtime.kernels.output import output_kernel
from kvcompress.runtime.kernels.prepare import prepare_kernel
from kvcompress.runtime.kernels.scores import score_kernel
from kvcompress.runtime.kernels.values import value_kernel

_ABSORB_WIDTH = 64


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
class Angles:
    """RoPE of the packed tokens, where their keys have a mean. table: of `angle_table`; origin: [batch] int32, the
    packed token at position 0 of each sequence, so that token t has position t - origin."""

    table: Tensor
    origin: Tensor


def angle_table(inv_freq: Tensor, n_positions: int, *, scale: float = 1.0) -> Tensor:
    """Return scale * (cos, sin) of every position and frequency, then zeros: [n_positions, a multiple of 32] float16."""
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


def packed_attention(
    query: Tensor,
    keys: PackedSite,
    values: PackedSite,
    *,
    first: Tensor,
    last: Tensor,
    n_blocks: int,
    exact: ExactTokens,
    scaling: float,
    mask: Tensor | None = None,
    angles: Angles | None = None,
    n_splits: int | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention over packed, sink and recent tokens: [batch, n_queries, heads, head_dim], in query's dtype.

    query: [batch, heads, n_queries, head_dim] after RoPE; `keys` must be of a basis that commutes with RoPE. first,
    last: [batch] int32, the packed tokens [first, last) that count for each sequence; n_blocks: packed blocks in use.
    angles: the positions, where keys have a mean. mask: [batch, >= n_blocks * 32] uint8, 0 where a packed token must not be seen. A query that sees nothing gives 0.
    """
    batch, n_heads, n_queries, head_dim = query.shape
    if (keys.mean is None) != (angles is None):
        raise OptionError("keys with a mean need the angles of their positions, and others must not have them.")
    if tuning is None:
        tuning = RANKS_TUNING if values.counts.get(16) else DEFAULT_TUNING
    n_kv_heads = exact.keys.shape[1]
    group_columns = n_heads // n_kv_heads * n_queries
    columns = 32 if n_heads * n_queries > 16 else 16
    n_columns = -(-n_heads * n_queries // columns) * columns
    tile_blocks = tuning.tile_blocks
    n_tiles = max(1, -(-n_blocks // tile_blocks))
    device = query.device
    asm = _uses_asm(device)
    query = query if query.stride(3) == 1 else query.contiguous()
    scale = scaling * math.log2(math.e)

    # 1. absorbed query, exact tokens
    n_k, n_v = keys.n_components, values.n_components
    # Columns beyond the queries' own are computed like any other, so they must hold finite numbers.
    new = torch.empty if n_columns == n_heads * n_queries else torch.zeros
    absorbed = new(batch, n_k, n_columns, dtype=torch.float16, device=device)
    n_chunks = -(-n_k // _ABSORB_WIDTH)
    bias = new(n_chunks, batch, n_columns, device=device)
    exact_sums = torch.empty(batch, n_columns, head_dim, device=device)
    exact_tops, exact_totals = torch.empty(2, batch, n_columns, device=device)
    packed_tops = new(batch, n_columns, device=device)
    mean_dim = 0 if angles is None else angles.table.shape[1]
    new_mean = new if mean_dim == head_dim else torch.zeros
    mean_query = new_mean(batch, mean_dim, n_columns, dtype=torch.float16, device=device)
    dim = max(16, triton.next_power_of_2(head_dim))
    rows = max(16, triton.next_power_of_2(group_columns))
    absorb_columns = 16 if batch * group_columns <= 16 else 32
    n_absorb = n_chunks * n_kv_heads * -(-batch * group_columns // absorb_columns)
    prepare_kernel[(batch * n_kv_heads + n_absorb,)](
        query, keys.decoder, _offsets(keys), absorbed, bias, exact.sink_keys, exact.sink_values, exact.keys,
        exact.values, first if exact.mask is None else exact.mask, exact_sums, exact_tops, exact_totals, packed_tops,
        first if keys.mean is None else keys.mean, mean_query, *query.stride()[:3], keys.decoder.stride(0), *exact.sink_keys.stride()[:3], *exact.keys.stride()[:3],
        *exact.values.stride()[:3], n_chunks, n_k, batch, n_kv_heads, exact.sink_keys.shape[2], exact.keys.shape[2],
        n_queries, group_columns, n_columns, scale,
        HEAD_DIM=head_dim, DIM=dim, WIDTH=_ABSORB_WIDTH, COLUMNS=absorb_columns, ROWS=rows, TOKENS=tuning.prepare_tokens,
        HAS_MASK=exact.mask is not None, MEAN_DIM=mean_dim, num_warps=tuning.prepare_warps,
    )  # fmt: skip

    # 2. weights of the packed tokens
    weights = torch.empty(batch, n_tiles, tile_blocks * 32, n_columns, dtype=torch.float16, device=device)
    tops, totals, weighted = torch.empty(3, batch, n_tiles, n_columns, device=device)
    shifts = _shifts(device)
    key_unit, value_unit = _row_unit(keys), _row_unit(values)
    mask_tensor = first if mask is None else mask
    score_kernel[(n_tiles, n_columns // columns, batch)](
        absorbed, bias, keys.words, shifts, first, last, mask_tensor, values.words, mean_query,
        mean_query if angles is None else angles.table, first if angles is None else angles.origin, weights, tops,
        totals, weighted, packed_tops,
        keys.words.stride(0), keys.words.stride(1) // key_unit, values.words.stride(0), values.words.stride(1),
        keys.gain_word, values.gain_word, 0 if angles is None else angles.table.shape[0], n_blocks, n_tiles, n_columns, n_chunks,
        0 if mask is None else mask.stride(0), *keys.class_counts,
        ROW_UNIT=key_unit, CLASSES=_classes(keys), COLUMNS=columns, WIDTH=tuning.score_width,
        STAGES=tuning.score_stages, HAS_MASK=mask is not None, KEY_GAIN=keys.has_gain,
        VALUE_GAIN=values.has_gain, MEAN_DIM=mean_dim, SMALL=not keys.counts.get(16), ASM=asm,
        CHUNKS=max(16, triton.next_power_of_2(n_chunks)),
        BLOCKS=tile_blocks, num_warps=tuning.score_warps,
    )  # fmt: skip

    # 3. weighted sums of value codes
    width = tuning.value_width
    chunks = sum(
        -(-count // (width // 2 if bits > 4 else width))
        for bits, count in zip(LEVELS, values.class_counts, strict=True)
    )
    if n_splits is None:
        n_splits = max(1, round(tuning.value_programs * _multiprocessors(device) / max(1, chunks * batch)))
    per_split = -(-n_tiles // min(n_splits, n_tiles))
    n_splits = -(-n_tiles // per_split)
    sum_stride = -(-n_v // 16) * 16
    sums = torch.empty(batch, n_splits, n_columns, sum_stride, device=device)
    if n_v:
        value_kernel[(n_splits, batch * (n_columns // columns), chunks)](
            values.words, shifts, weights, tops, packed_tops, sums, values.words.stride(0), values.words.stride(1) // value_unit,
            n_blocks, n_tiles, per_split, n_columns, sum_stride, *values.class_counts,
            ROW_UNIT=value_unit, CLASSES=_classes(values), COLUMNS=columns, WIDTH=width, TILE=tile_blocks, BLOCKS=tuning.value_blocks,
            STAGES=tuning.value_stages, ASM=asm, num_warps=tuning.value_warps,
            **({"maxnreg": tuning.value_registers} if asm else {}),
        )  # fmt: skip

    # 4. splits added up, decoded, joined with the exact tokens
    out = torch.empty(batch, n_queries, n_heads, head_dim, dtype=query.dtype, device=device)
    out_dim = min(dim, 64)
    output_kernel[(n_kv_heads, batch, dim // out_dim)](
        sums, _offsets(values), packed_tops, tops, totals, weighted, exact_sums, exact_tops, exact_totals, values.decoder,
        first if values.mean is None else values.mean, out, *out.stride()[:3], values.decoder.stride(0),
        n_v, sum_stride, n_splits, n_tiles, n_queries, group_columns, n_columns,
        HEAD_DIM=head_dim, DIM=out_dim, GROUP=triton.next_power_of_2(group_columns), ROWS=rows,
        WIDTH=tuning.output_width, SPLITS=min(8, triton.next_power_of_2(n_splits)), TILES=128,
        HAS_MEAN=values.mean is not None, num_warps=tuning.output_warps,
    )  # fmt: skip
    return out


def _uses_asm(device: torch.device) -> bool:
    """Inline instructions need a NVIDIA GPU; Triton's interpreter and other GPUs take the plain expressions."""
    return device.type == "cuda" and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


def _classes(site: PackedSite) -> int:
    return sum(bits for bits in LEVELS if site.counts.get(bits, 0))


def _row_unit(site: PackedSite) -> int:
    """Return how many words the rows' stride is a multiple of, so that the compiler knows their alignment."""
    strides = math.gcd(site.words.stride(0), site.words.stride(1), 4)
    return strides if site.words.data_ptr() % 16 == 0 else 1


def _offsets(site: PackedSite) -> Tensor:
    return _cached_offsets(tuple(sorted(site.counts.items())), site.words.device)


@lru_cache(maxsize=1024)
def _cached_offsets(counts: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return offsets(dict(counts), device)


@lru_cache(maxsize=64)
def _shifts(device: torch.device) -> Tensor:
    """Return where the two bytes of a half word start, as a tensor: see unpack.raw_tile."""
    return torch.tensor([0, 8], dtype=torch.int16, device=device)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
