"""Decode attention over the packed cache: four Triton launches, from queries to outputs.

1. prepare_kernel: the key decoder goes into the query; attention over sinks and recent tokens. 2. score_kernel: softmax
weights of all packed tokens, relative to their tile. 3. value_kernel: weighted sums of value codes. 4. output_kernel:
splits added up, decoded, joined with the exact tokens. docs/speed.md says why it is two passes and not one.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.arguments import DEFAULT_TUNING, RANKS_TUNING, Angles, ExactTokens, PackedPages, Tuning
from kvcompress.kernels.layout import BLOCK_TOKENS, LEVELS, PackedSite, offsets
from kvcompress.kernels.output import output_kernel
from kvcompress.kernels.prepare import prepare_kernel
from kvcompress.kernels.scores import score_kernel
from kvcompress.kernels.values import value_kernel

_ABSORB_WIDTH = 64


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
    pages: PackedPages | None = None,
) -> Tensor:
    """Return attention over packed, sink and recent tokens: [batch, n_queries, heads, head_dim], in query's dtype.

    query: [batch, heads, n_queries, head_dim] after RoPE; `keys` must be of a basis that commutes with RoPE. first,
    last: [batch] int32, the packed tokens [first, last) that count for each sequence; n_blocks: packed blocks in use.
    angles: the positions, where keys have a mean. mask: [batch, >= n_blocks * 32] uint8, 0 where a packed token must
    not be seen. pages: where the words of both sites are pages, [pages, blocks of a page, n_words], of at least 4
    blocks; n_blocks are then those of the longest sequence. A query that sees nothing gives 0. Raises OptionError if
    angles and a mean of keys do not go together, or pages are too short.
    """
    if (keys.mean is None) != (angles is None):
        raise OptionError("keys with a mean need the angles of their positions, and others must not have them.")
    if tuning is None:
        tuning = RANKS_TUNING if values.counts.get(16) else DEFAULT_TUNING
    page_blocks = 0 if pages is None else keys.words.shape[1]
    if page_blocks % 4:
        raise OptionError(f"pages of {page_blocks} blocks of 32 tokens. The kernels take 4, 8, 16, ...")
    if page_blocks:
        tuning = replace(tuning, tile_blocks=min(tuning.tile_blocks, page_blocks))
    query = query if query.stride(3) == 1 else query.contiguous()
    step = _Step.of(query, exact, n_blocks, tuning, pages)
    prepared = _prepare(step, query, keys, exact, angles, scaling * math.log2(math.e))
    weights = _score(step, prepared, keys, values, first, last, mask, angles)
    sums, n_splits = _sum_values(step, prepared, weights, values, last, n_splits)
    return _output(step, prepared, weights, sums, n_splits, values, query)


@dataclass(frozen=True, slots=True)
class _Step:
    """Sizes of one call. A column is (head, query token); they are padded to whole groups of `columns`."""

    batch: int
    n_heads: int
    n_kv_heads: int
    n_queries: int
    head_dim: int
    n_blocks: int
    n_tiles: int
    columns: int
    device: torch.device
    asm: bool
    tuning: Tuning
    pages: PackedPages | None

    @classmethod
    def of(cls, query: Tensor, exact: ExactTokens, n_blocks: int, tuning: Tuning, pages: PackedPages | None) -> _Step:
        batch, n_heads, n_queries, head_dim = query.shape
        n_tiles = max(1, -(-n_blocks // tuning.tile_blocks))
        columns = 32 if n_heads * n_queries > 16 else 16
        return cls(
            batch, n_heads, exact.keys.shape[1], n_queries, head_dim, n_blocks, n_tiles, columns, query.device,
            _uses_asm(query.device), tuning, pages,
        )  # fmt: skip

    @property
    def group_columns(self) -> int:
        """Columns of one KV head."""
        return self.n_heads // self.n_kv_heads * self.n_queries

    @property
    def n_columns(self) -> int:
        return -(-self.n_heads * self.n_queries // self.columns) * self.columns

    @property
    def dim(self) -> int:
        return max(16, int(triton.next_power_of_2(self.head_dim)))

    @property
    def rows(self) -> int:
        """Rows of a matrix product over one KV head's columns."""
        return max(16, int(triton.next_power_of_2(self.group_columns)))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def finite(self, *shape: int, dtype: torch.dtype = torch.float32, whole: bool = True) -> Tensor:
        """Like empty, but zeros if not every column is written: columns of no query are computed like any other."""
        if whole and self.n_columns == self.n_heads * self.n_queries:
            return self.empty(*shape, dtype=dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What prepare_kernel gives; shapes in its docstring."""

    absorbed: Tensor
    bias: Tensor
    mean_query: Tensor
    packed_tops: Tensor
    exact_sums: Tensor
    exact_tops: Tensor
    exact_totals: Tensor


@dataclass(frozen=True, slots=True)
class _Weights:
    """What score_kernel gives; shapes in its docstring."""

    weights: Tensor
    tops: Tensor
    sums: Tensor
    weighted_sums: Tensor


def _prepare(
    step: _Step, query: Tensor, keys: PackedSite, exact: ExactTokens, angles: Angles | None, scale: float
) -> _Prepared:
    batch, n_columns, n_k = step.batch, step.n_columns, keys.n_components
    n_chunks = -(-n_k // _ABSORB_WIDTH)
    mean_dim = 0 if angles is None else angles.table.shape[1]
    half = torch.float16
    prepared = _Prepared(
        step.finite(batch, n_k, n_columns, dtype=half),
        step.finite(n_chunks, batch, n_columns),
        step.finite(batch, mean_dim, n_columns, dtype=half, whole=mean_dim == step.head_dim),
        step.finite(batch, n_columns),
        step.empty(batch, n_columns, step.head_dim),
        step.empty(batch, n_columns),
        step.empty(batch, n_columns),
    )
    columns = 16 if batch * step.group_columns <= 16 else 32
    n_absorb = n_chunks * step.n_kv_heads * -(-batch * step.group_columns // columns)
    unused = query
    prepare_kernel[(batch * step.n_kv_heads + n_absorb,)](
        query, keys.decoder, _offsets(keys), prepared.absorbed, prepared.bias, exact.sink_keys, exact.sink_values,
        exact.keys, exact.values, unused if exact.mask is None else exact.mask, prepared.exact_sums,
        prepared.exact_tops, prepared.exact_totals, prepared.packed_tops, unused if keys.mean is None else keys.mean,
        prepared.mean_query, *query.stride()[:3], keys.decoder.stride(0), *exact.sink_keys.stride()[:3],
        *exact.keys.stride()[:3], *exact.values.stride()[:3], n_chunks, n_k, batch, step.n_kv_heads,
        exact.sink_keys.shape[2], exact.keys.shape[2], step.n_queries, step.group_columns, n_columns, scale,
        HEAD_DIM=step.head_dim, DIM=step.dim, WIDTH=_ABSORB_WIDTH, COLUMNS=columns, ROWS=step.rows,
        TOKENS=step.tuning.prepare_tokens, HAS_MASK=exact.mask is not None, MEAN_DIM=mean_dim,
        num_warps=step.tuning.prepare_warps,
    )  # fmt: skip
    return prepared


def _score(
    step: _Step, prepared: _Prepared, keys: PackedSite, values: PackedSite, first: Tensor, last: Tensor,
    mask: Tensor | None, angles: Angles | None,
) -> _Weights:  # fmt: skip
    batch, n_tiles, n_columns, tuning = step.batch, step.n_tiles, step.n_columns, step.tuning
    tokens = tuning.tile_blocks * BLOCK_TOKENS
    result = _Weights(
        step.empty(batch, n_tiles, tokens, n_columns, dtype=torch.float16),
        *(step.empty(batch, n_tiles, n_columns) for _ in range(3)),
    )
    unit, n_chunks = _row_unit(keys), prepared.bias.shape[0]
    unused = first
    score_kernel[(n_tiles, n_columns // step.columns, batch)](
        prepared.absorbed, prepared.bias, keys.words, _shifts(step.device), first, last,
        unused if mask is None else mask, values.words, prepared.mean_query,
        unused if angles is None else angles.table, unused if angles is None else angles.origin,
        *((unused, unused) if step.pages is None else (step.pages.rows, step.pages.table)), result.weights,
        result.tops, result.sums, result.weighted_sums, prepared.packed_tops,
        keys.words.stride(0), keys.words.stride(1) // unit, values.words.stride(0), values.words.stride(1),
        keys.gain_word, values.gain_word, 0 if angles is None else angles.table.shape[0], step.n_blocks, n_tiles,
        n_columns, n_chunks, 0 if mask is None else mask.stride(0),
        0 if step.pages is None else step.pages.table.stride(0), *keys.class_counts,
        ROW_UNIT=unit, CLASSES=_classes(keys), BLOCKS=tuning.tile_blocks, COLUMNS=step.columns,
        CHUNKS=max(16, triton.next_power_of_2(n_chunks)), WIDTH=tuning.score_width, STAGES=tuning.score_stages,
        HAS_MASK=mask is not None, KEY_GAIN=keys.has_gain, VALUE_GAIN=values.has_gain,
        MEAN_DIM=prepared.mean_query.shape[1], SMALL=not keys.counts.get(16), ASM=step.asm,
        PAGE_BLOCKS=0 if step.pages is None else keys.words.shape[1], num_warps=tuning.score_warps,
    )  # fmt: skip
    return result


def _sum_values(
    step: _Step, prepared: _Prepared, weights: _Weights, values: PackedSite, last: Tensor, n_splits: int | None
) -> tuple[Tensor, int]:
    """Return the sums [batch, n_splits, n_columns, >= R] of weighted codes, and n_splits."""
    tuning, n_v = step.tuning, values.n_components
    per_class = (tuning.value_width // 2 if bits > 4 else tuning.value_width for bits in LEVELS)
    chunks = sum(-(-count // width) for count, width in zip(values.class_counts, per_class, strict=True))
    if n_splits is None:
        programs = tuning.value_programs * _multiprocessors(step.device)
        n_splits = max(1, round(programs / max(1, chunks * step.batch)))
    per_split = -(-step.n_tiles // min(n_splits, step.n_tiles))
    n_splits = -(-step.n_tiles // per_split)
    sums = step.empty(step.batch, n_splits, step.n_columns, -(-n_v // 16) * 16)
    unit = _row_unit(values)
    if n_v:
        value_kernel[(n_splits, step.batch * (step.n_columns // step.columns), chunks)](
            values.words, _shifts(step.device), weights.weights, weights.tops, prepared.packed_tops, sums, last,
            *((last, last) if step.pages is None else (step.pages.rows, step.pages.table)), values.words.stride(0),
            values.words.stride(1) // unit, step.n_blocks, step.n_tiles, per_split,
            step.n_columns, sums.shape[3], 0 if step.pages is None else step.pages.table.stride(0),
            *values.class_counts,
            ROW_UNIT=unit, CLASSES=_classes(values), COLUMNS=step.columns, WIDTH=tuning.value_width,
            TILE=tuning.tile_blocks, BLOCKS=tuning.value_blocks, STAGES=tuning.value_stages, ASM=step.asm,
            PAGE_BLOCKS=0 if step.pages is None else values.words.shape[1],
            num_warps=tuning.value_warps, **({"maxnreg": tuning.value_registers} if step.asm else {}),
        )  # fmt: skip
    return sums, n_splits


def _output(
    step: _Step, prepared: _Prepared, weights: _Weights, sums: Tensor, n_splits: int, values: PackedSite, query: Tensor
) -> Tensor:
    out = step.empty(step.batch, step.n_queries, step.n_heads, step.head_dim, dtype=query.dtype)
    dim = min(step.dim, 64)
    output_kernel[(step.n_kv_heads, step.batch, step.dim // dim)](
        sums, _offsets(values), prepared.packed_tops, weights.tops, weights.sums, weights.weighted_sums,
        prepared.exact_sums, prepared.exact_tops, prepared.exact_totals, values.decoder,
        sums if values.mean is None else values.mean, out, *out.stride()[:3], values.decoder.stride(0),
        values.n_components, sums.shape[3], n_splits, step.n_tiles, step.n_queries, step.group_columns, step.n_columns,
        HEAD_DIM=step.head_dim, DIM=dim, GROUP=triton.next_power_of_2(step.group_columns), ROWS=step.rows,
        WIDTH=step.tuning.output_width, SPLITS=min(8, triton.next_power_of_2(n_splits)), TILES=128,
        HAS_MEAN=values.mean is not None, num_warps=step.tuning.output_warps,
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
