"""Decode attention over keys un-rotated turn by turn: CUDA launches, compiled by NVRTC for a layer's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvcompress.kernels.arguments import ExactTokens
from kvcompress.kernels.group_layout import GroupLayout
from kvcompress.kernels.launch import overlapping
from kvcompress.kernels.launch_shapes import (
    CODES,
    MOST_COLUMNS,
    NUMBERS,
    UNIT_TOKENS,
    Launch,
    best_splits,
    launch_of,
    pass_heads,
    passes,
    turn_rows,
)
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.kernels.nvrtc import compiled
from kvcompress.options import TURN_HEAD_DIMS

#: More sets of 32 value components than this do not fit a thread's registers.
MOST_SETS = 20
#: Recent tokens beside the packed ones, at most: reading more of them would take longer than what is packed.
MOST_EXACT = 1024
_SHARED_FILES = ("common", "exact", "absorb", "sums")
PREPARE_WARPS = 4
_RING = 4
#: Shared bytes of `prepare` for each dimension of a head: RING halves of sets.
PREPARE_MEMORY = 32 * _RING
EXACT_TOKENS = 16
COMBINE_THREADS = 1024
#: Shared bytes of `combine`, more than it ever asks for.
COMBINE_MEMORY = 98304


@dataclass(frozen=True, slots=True)
class GroupedSite:
    """One site of the packed cache in tiles, whose components mix the heads of one group only.

    words: [batch, n_blocks, n_words] int32. layout: see GroupLayout, its table on the device. maps: of values
    `head_decoders`, of keys `decoder_fragments` of these. mean: [n] float32: of values, or of keys before RoPE.
    gain_word: where in a row the gains begin, None without gains. largest_rows: of keys, see group_layout.
    """

    words: Tensor
    layout: GroupLayout
    maps: Tensor
    mean: Tensor | None
    gain_word: int | None
    largest_rows: Tensor | None = None


def applies(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, device: torch.device
) -> bool:
    """Return whether the kernels take these sizes."""
    if len(keys.table) != len(values.table) or n_kv_heads % len(keys.table) or head_dim not in TURN_HEAD_DIMS:
        return False
    if n_heads // n_kv_heads > MOST_COLUMNS or min(sum(keys.sets), sum(values.sets)) == 0:
        return False
    if max(sum(keys.sets), sum(values.sets)) > MOST_SETS:
        return False
    return launch_of(n_heads, n_kv_heads, head_dim, keys, values, device) is not None


def turned_attention(
    query: Tensor,
    keys: GroupedSite,
    values: GroupedSite,
    *,
    turn: int,
    angles: Tensor,
    first: Tensor,
    last: Tensor,
    n_blocks: int,
    exact: ExactTokens,
    scaling: float,
    mask: Tensor | None = None,
    n_splits: int | None = None,
) -> Tensor:
    """Return attention of one query token a sequence over packed, sink and recent tokens: [batch, 1, heads, head_dim].

    query: [batch, heads, 1, head_dim] after RoPE, float16 or bfloat16, as the exact tokens. turn: 128, 256, 512, ...
    angles: [1 or batch, >= n_turns, head_dim / 2, 2] float32, cos and sin at the position of each turn's first token.
    first, last, mask, n_blocks: as for decode.packed_attention. The result does not depend on n_splits beyond rounding.
    """
    n_heads, head_dim = query.shape[1], query.shape[3]
    n_kv_heads, n_groups = exact.keys.shape[1], len(keys.layout.table)
    device = query.device
    launch, constants = compiled_as(
        keys, values, n_heads, n_kv_heads, head_dim, masked=mask is not None, dtype=query.dtype, device=device
    )
    *attends, combine = _kernels(constants, launch.names, launch.memory, device)
    if n_splits is None:
        n_splits = best_splits(query.shape[0] * passes(n_heads, n_kv_heads, n_groups), device)
    n_splits = min(n_splits, -(-n_blocks * BLOCK_TOKENS // UNIT_TOKENS))
    query = query if query.stride(3) == 1 else query.contiguous()
    step = _Step(query, keys, values, turn, angles, first, last, n_blocks, exact, mask, n_splits)
    scale = scaling * 1.4426950408889634  # scores are powers of two
    if launch.names == NUMBERS:
        _attend_numbers(attends[0], launch, step, scale)
    else:
        absorbed = _absorb(attends[0], step, scale)  # kept until all is launched
        _attend_codes(attends[1], launch, step, *absorbed)
    return _combine(combine, step)


def compiled_as(
    keys: GroupedSite, values: GroupedSite, n_heads: int, n_kv_heads: int, head_dim: int, *, masked: bool,
    dtype: torch.dtype, device: torch.device,
) -> tuple[Launch, tuple[tuple[str, int], ...]]:  # fmt: skip
    """Return the launch of a step of such sizes, which `applies` takes, and the constants of its kernels."""
    launch = launch_of(n_heads, n_kv_heads, head_dim, keys.layout, values.layout, device)
    assert launch is not None  # see applies
    columns = n_kv_heads // len(keys.layout.table), n_heads // n_kv_heads
    return launch, constants_of(keys, values, launch, head_dim, *columns, masked, dtype)


class _Step:
    """What the kernels of one step are given, in the order of their parameters, and what they leave to each other."""

    def __init__(
        self, query: Tensor, keys: GroupedSite, values: GroupedSite, turn: int, angles: Tensor, first: Tensor,
        last: Tensor, n_blocks: int, exact: ExactTokens, mask: Tensor | None, n_splits: int,
    ) -> None:  # fmt: skip
        """The arguments are those of turned_attention."""
        self.query, self.keys, self.values, self.turn, self.last = query, keys, values, turn, last
        self.batch, n_heads, _, self.head_dim = query.shape
        self.n_kv_heads, self.n_groups = exact.keys.shape[1], len(keys.layout.table)
        self.group_columns = n_heads // self.n_kv_heads
        self.n_passes = passes(n_heads, self.n_kv_heads, self.n_groups)
        self.n_blocks, self.n_turns = n_blocks, -(-n_blocks * BLOCK_TOKENS // turn)
        self.n_splits = n_splits
        n_exact = exact.sink_keys.shape[2] + exact.keys.shape[2]
        self.n_exact_parts = -(-n_exact // EXACT_TOKENS)

        device, nothing = query.device, query
        parts = self.batch, self.n_kv_heads, self.n_exact_parts, self.group_columns
        splits = self.batch, self.n_passes, n_splits
        self.exact_sums, self.exact_stats = (torch.empty(*parts, n, device=device) for n in (self.head_dim, 2))
        self.stats = torch.empty(*splits, 3, MOST_COLUMNS, device=device)
        self.sums = torch.empty(*splits, 32 * sum(values.layout.sets), MOST_COLUMNS, device=device)

        key_mean = _zeros(self.n_kv_heads * self.head_dim, device) if keys.mean is None else keys.mean
        self.to_absorb = [query, keys.maps, key_mean, angles]
        self.angle_batch = angles.stride(0) // 2 if angles.shape[0] > 1 else 0
        self.exact = [
            exact.sink_keys, exact.sink_values, exact.keys, exact.values,
            nothing if exact.mask is None else exact.mask, self.exact_sums, self.exact_stats,
        ]  # fmt: skip
        self.exact_sizes = [
            exact.sink_keys.shape[2], exact.keys.shape[2], int(exact.mask is not None), *query.stride()[:2],
            *exact.sink_keys.stride()[:3], *exact.keys.stride()[:3], *exact.values.stride()[:3],
        ]  # fmt: skip
        self.packed = [keys.words, values.words, keys.layout.table, values.layout.table]
        self.row_sizes = [
            keys.words.stride(1), values.words.stride(1), keys.words.stride(0) // keys.words.stride(1),
            values.words.stride(0) // values.words.stride(1),
        ]  # fmt: skip
        self.seen = [first, last, nothing if mask is None else mask, self.stats, self.sums]
        self.mask_stride = 0 if mask is None else mask.stride(0)

    def grid(self, launch: Launch) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
        """Return thread blocks, threads of each, and the shift that makes a turn of a unit of tokens."""
        threads = 32 * (launch.warps + launch.absorbers)
        shift = (self.turn // launch.unit_tokens).bit_length() - 1
        each = self.n_passes // self.n_groups
        return (self.n_splits * each, self.n_groups, self.batch), (threads, 1, 1), shift


def _attend_numbers(attend: Any, launch: Launch, step: _Step, scale: float) -> None:
    grid, threads, turn_shift = step.grid(launch)
    attend(
        grid, threads,
        [
            *step.to_absorb, *step.exact, *step.packed, *step.seen, step.angle_batch, *step.exact_sizes, step.n_blocks,
            step.n_turns, turn_shift, *step.row_sizes, step.mask_stride, scale,
        ],
        launch.memory,
    )  # fmt: skip


def _absorb(prepare: Any, step: _Step, scale: float) -> tuple[Tensor, Tensor]:
    # Columns of no query are computed as well, so that they must hold numbers.
    all_used = step.n_passes * MOST_COLUMNS == step.query.shape[1]
    new = torch.empty if all_used else torch.zeros
    turns, device = (step.batch, step.n_turns, step.n_passes), step.query.device
    absorbed = new(*turns, sum(step.keys.layout.sets), 128, dtype=torch.int32, device=device)
    biases = new(*turns, MOST_COLUMNS, 4, device=device)
    heads = step.batch * step.n_kv_heads
    exact_blocks = -(-heads * step.n_exact_parts // PREPARE_WARPS)
    absorb_blocks = heads * -(-step.n_turns // (turn_rows(step.group_columns) * PREPARE_WARPS))
    prepare(
        (exact_blocks + absorb_blocks, 1, 1), (32 * PREPARE_WARPS, 1, 1),
        [
            *step.to_absorb, step.keys.largest_rows, step.last, absorbed, biases, *step.exact, step.batch, step.n_turns,
            step.n_kv_heads, (step.turn // UNIT_TOKENS).bit_length() - 1, step.angle_batch, *step.exact_sizes, scale,
        ],
        PREPARE_MEMORY * step.head_dim,
    )  # fmt: skip
    return absorbed, biases


def _attend_codes(attend: Any, launch: Launch, step: _Step, absorbed: Tensor, biases: Tensor) -> None:
    grid, threads, turn_shift = step.grid(launch)
    attend(
        grid, threads,
        [
            *step.packed, absorbed, biases, *step.seen, step.n_blocks, step.n_turns, turn_shift, *step.row_sizes,
            step.keys.gain_word or 0, step.values.gain_word or 0, step.mask_stride,
        ],
        launch.memory,
    )  # fmt: skip


def _combine(combine: Any, step: _Step) -> Tensor:
    query, mean = step.query, step.values.mean
    out = torch.empty(step.batch, 1, query.shape[1], step.head_dim, dtype=query.dtype, device=query.device)
    n_floats = step.n_splits + step.n_exact_parts + 32 * sum(step.values.layout.sets) + 2 * COMBINE_THREADS
    combine(
        (step.n_kv_heads, step.batch, 1), (COMBINE_THREADS, 1, 1),
        [
            step.stats, step.sums, step.exact_sums, step.exact_stats, step.values.maps, query if mean is None else mean,
            out, step.n_splits, step.n_exact_parts, out.stride(0), out.stride(2), int(mean is not None),
        ],
        4 * step.group_columns * n_floats,
    )  # fmt: skip
    return out


def constants_of(
    keys: GroupedSite, values: GroupedSite, launch: Launch, head_dim: int, group_heads: int, group_columns: int,
    masked: bool, dtype: torch.dtype, *, page_blocks: int = 0, exact_page: int = 0,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    """Return the constants of cuda/common.cu. page_blocks, exact_page: where the cache lies in pages."""
    sets = {
        f"{part}{kind}": n
        for part, site in (("K", keys), ("V", values))
        for kind, n in zip("FNPS", site.layout.sets, strict=True)
    }
    named = {
        "HEAD_DIM": head_dim,
        "GROUP_HEADS": group_heads,
        "GROUP_COLUMNS": group_columns,
        "PASS_HEADS": min(group_heads, pass_heads(group_columns)),
        **sets,
        "KEY_WORDS": keys.layout.n_words,
        "VALUE_WORDS": values.layout.n_words,
        "KEY_HOLES": int(keys.layout.has_holes),
        "VALUE_HOLES": int(values.layout.has_holes),
        "KEY_GAIN": int(keys.gain_word is not None),
        "VALUE_GAIN": int(values.gain_word is not None),
        "HAS_MASK": int(masked),
        "PAGE_BLOCKS": page_blocks,
        "EXACT_PAGE": exact_page,
        "WARPS": launch.warps,
        "BLOCKS" if launch.names == CODES else "SLOTS": launch.per_warp,
        "ABSORBERS": launch.absorbers,
        "TURN_ROWS": turn_rows(group_columns),
        "EXACT_TOKENS": EXACT_TOKENS,
        "PREPARE_WARPS": PREPARE_WARPS,
        "RING": _RING,
        "COMBINE_THREADS": COMBINE_THREADS,
        "QUERY_BF16": int(dtype == torch.bfloat16),
    }
    return tuple(named.items())


def kernel_source(constants: tuple[tuple[str, int], ...], names: tuple[str, ...]) -> str:
    """Return the CUDA source of the kernels CODES or NUMBERS."""
    directory = files(__package__).joinpath("cuda")
    texts = (directory.joinpath(f"{name}.cu").read_text(encoding="utf-8") for name in _SHARED_FILES + names)
    return "".join(f"#define {name} {value}\n" for name, value in constants) + "\n".join(texts)


@lru_cache(maxsize=1024)
def _kernels(
    constants: tuple[tuple[str, int], ...], names: tuple[str, ...], memory: int, device: torch.device
) -> list[Any]:
    """Return what is launched, in turn. memory: shared by those before the last, in bytes."""
    module = compiled(kernel_source(constants, names), names[0], device)
    kernels = [getattr(module, name) for name in names]
    kernels[-2].set_shared_memory_config(memory)
    kernels[-1].set_shared_memory_config(COMBINE_MEMORY)
    return [kernels[0], *(overlapping(kernel, device) for kernel in kernels[1:])]


@lru_cache(maxsize=64)
def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, device=device)
