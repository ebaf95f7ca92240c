"""Decode attention over keys un-rotated turn by turn: CUDA launches, compiled by NVRTC for a layer's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvcompress.runtime.kernels.arguments import ExactTokens
from kvcompress.runtime.kernels.group_layout import GroupLayout
from kvcompress.runtime.kernels.launch import overlapping
from kvcompress.runtime.kernels.layout import BLOCK_TOKENS
from kvcompress.runtime.kernels.nvrtc import compiled

#: Columns of one product of the matrix units: query heads of a group of KV heads.
MOST_COLUMNS = 8
#: More sets of 32 value components than this do not fit a thread's registers.
MOST_SETS = 20
#: Recent tokens beside the packed ones, at most: reading more of them would take longer than what is packed.
MOST_EXACT = 1024
#: Tokens that a warp takes at once, at most; a turn is a multiple.
UNIT_TOKENS = 128
#: (warps of a thread block of `attend`, packed blocks that each takes at once), the fastest first: more than eight
#: warps do not have the registers they need, fewer wait for each instruction's result, and other numbers cannot share
#: most contexts out evenly.
_LAUNCHES = ((8, 4), (8, 2), (4, 4), (3, 4), (2, 4), (1, 4))
#: Places of a warp of `attend_numbers` for keys or values of one packed block, at most, and bytes of all of them: more
#: are no faster.
_MOST_SLOTS, _MOST_SLOT_BYTES = 8, 1 << 17
#: What is launched where there are codes, and where all components are float16 numbers; all but the first may begin
#: while the one before ends. A file of cuda/ each.
CODES = ("prepare", "attend", "combine")
NUMBERS = ("attend_numbers", "combine")
_SHARED_FILES = ("common", "exact", "absorb", "sums")
_PREPARE_WARPS = 4
_RING = 4
_EXACT_TOKENS = 16
_COMBINE_THREADS = 1024
#: Shared bytes of `combine`, more than it ever asks for.
_COMBINE_MEMORY = 98304


@dataclass(frozen=True, slots=True)
class GroupedSite:
    """One site of the packed cache in tiles, whose components mix the heads of one group only.

    words: [batch, n_blocks, n_words] int32. layout: see GroupLayout, its table on the device. maps: of values
    `head_decoders`, of keys `decoder_fragments` of these. mean: [n] float32: of values, or of keys before RoPE.
    gain_word: where in a row the gains begin, None without gains.
    """

    words: Tensor
    layout: GroupLayout
    maps: Tensor
    mean: Tensor | None
    gain_word: int | None


def applies(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, device: torch.device
) -> bool:
    """Return whether the kernels take these sizes."""
    if len(keys.table) != len(values.table) or n_kv_heads % len(keys.table) or head_dim not in (64, 96, 128, 256):
        return False
    if n_heads // len(keys.table) > MOST_COLUMNS or min(sum(keys.sets), sum(values.sets)) == 0:
        return False
    if max(sum(keys.sets), sum(values.sets)) > MOST_SETS:
        return False
    return _launch_of(n_heads, n_kv_heads, head_dim, keys, values, device) is not None


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
    batch, n_heads, _, head_dim = query.shape
    n_kv_heads, n_groups = exact.keys.shape[1], len(keys.layout.table)
    group_columns, group_heads = n_heads // n_kv_heads, n_kv_heads // n_groups
    device = query.device
    launch = _launch_of(n_heads, n_kv_heads, head_dim, keys.layout, values.layout, device)
    assert launch is not None  # see applies
    constants = _constants(keys, values, launch, head_dim, group_heads, group_columns, mask is not None, query.dtype)
    kernels = _kernels(constants, launch.names, launch.memory, device)
    query = query if query.stride(3) == 1 else query.contiguous()
    nothing = query

    key_sets, value_sets = sum(keys.layout.sets), sum(values.layout.sets)
    n_turns = -(-n_blocks * BLOCK_TOKENS // turn)
    exact_parts = -(-(exact.sink_keys.shape[2] + exact.keys.shape[2]) // _EXACT_TOKENS)
    exact_sums = torch.empty(batch, n_kv_heads, exact_parts, group_columns, head_dim, device=device)
    exact_stats = torch.empty(batch, n_kv_heads, exact_parts, group_columns, 2, device=device)
    if n_splits is None:
        n_splits = _best_splits(batch * n_groups, _multiprocessors(device)[0])
    n_splits = min(n_splits, -(-n_blocks * BLOCK_TOKENS // UNIT_TOKENS))
    stats = torch.empty(batch, n_groups, n_splits, 3, MOST_COLUMNS, device=device)
    sums = torch.empty(batch, n_groups, n_splits, 32 * value_sets, MOST_COLUMNS, device=device)
    # What several launches are given.
    to_absorb = [query, keys.maps, _zeros(n_kv_heads * head_dim, device) if keys.mean is None else keys.mean, angles]
    angle_batch = angles.stride(0) // 2 if angles.shape[0] > 1 else 0
    exact_tensors = [
        exact.sink_keys, exact.sink_values, exact.keys, exact.values, nothing if exact.mask is None else exact.mask,
        exact_sums, exact_stats,
    ]  # fmt: skip
    exact_sizes = [
        exact.sink_keys.shape[2], exact.keys.shape[2], int(exact.mask is not None), *query.stride()[:2],
        *exact.sink_keys.stride()[:3], *exact.keys.stride()[:3], *exact.values.stride()[:3],
    ]  # fmt: skip
    packed = [keys.words, values.words, keys.layout.table, values.layout.table]
    seen = [first, last, nothing if mask is None else mask, stats, sums]
    row_sizes = [
        keys.words.stride(1), values.words.stride(1), keys.words.stride(0) // keys.words.stride(1),
        values.words.stride(0) // values.words.stride(1),
    ]  # fmt: skip
    mask_stride = 0 if mask is None else mask.stride(0)
    scale = scaling * 1.4426950408889634  # scores are powers of two
    grid, threads = (n_splits, n_groups, batch), (32 * (launch.warps + launch.absorbers), 1, 1)
    turn_shift = (turn // launch.unit_tokens).bit_length() - 1

    if launch.names == NUMBERS:
        arguments = [*to_absorb, *exact_tensors, *packed, *seen, angle_batch, *exact_sizes, n_blocks, n_turns]
        kernels[0](grid, threads, [*arguments, turn_shift, *row_sizes, mask_stride, scale], launch.memory)
    else:
        # Columns of no query are computed as well, so that they must hold numbers.
        new = torch.empty if n_heads // n_groups == MOST_COLUMNS else torch.zeros
        absorbed = new(batch, n_turns, n_groups, key_sets, 128, dtype=torch.int32, device=device)
        biases = new(batch, n_turns, n_groups, MOST_COLUMNS, 4, device=device)
        tasks = batch * n_kv_heads * -(-n_turns // (_turn_rows(group_columns) * _PREPARE_WARPS))
        kernels[0](
            (-(-batch * n_kv_heads * exact_parts // _PREPARE_WARPS) + tasks, 1, 1), (32 * _PREPARE_WARPS, 1, 1),
            [
                *to_absorb, last, absorbed, biases, *exact_tensors, batch, n_turns, n_kv_heads,
                (turn // UNIT_TOKENS).bit_length() - 1, angle_batch, *exact_sizes, scale,
            ],
            _RING * head_dim * 32,
        )  # fmt: skip
        gain_words = [keys.gain_word or 0, values.gain_word or 0]
        kernels[1](
            grid, threads,
            [
                *packed, absorbed, biases, *seen, n_blocks, n_turns, turn_shift, *row_sizes, *gain_words, mask_stride,
            ],
            launch.memory,
        )  # fmt: skip
    out = torch.empty(batch, 1, n_heads, head_dim, dtype=query.dtype, device=device)
    parts = _COMBINE_THREADS // (head_dim // 2)
    kernels[-1](
        (n_kv_heads, batch, 1), (_COMBINE_THREADS, 1, 1),
        [
            stats, sums, exact_sums, exact_stats, values.maps, nothing if values.mean is None else values.mean, out,
            n_splits, exact_parts, out.stride(0), out.stride(2), int(values.mean is not None),
        ],
        4 * group_columns * (n_splits + exact_parts + 32 * value_sets + parts * head_dim),
    )  # fmt: skip
    return out


def _turn_rows(group_columns: int) -> int:
    """Return of how many turns a warp absorbs the queries of one KV head at once: TURN_ROWS in cuda/absorb.cu."""
    return 16 // (1 << (group_columns - 1).bit_length())


@dataclass(frozen=True, slots=True)
class _Launch:
    """How the packed tokens are attended to. names: CODES or NUMBERS. warps: of a thread block, of which a
    multiprocessor has one. per_warp: of CODES the packed blocks that each takes at once, of NUMBERS its places for keys
    or values of a block. memory: shared, in bytes. absorbers: warps beside them, as in cuda/attend_numbers.cu.
    unit_tokens: those that a warp takes at once."""

    names: tuple[str, ...]
    warps: int
    per_warp: int
    memory: int

    @property
    def absorbers(self) -> int:
        return 0 if self.names == CODES else 4

    @property
    def unit_tokens(self) -> int:
        return BLOCK_TOKENS * (self.per_warp if self.names == CODES else 1)


def _launch_of(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, device: torch.device
) -> _Launch | None:
    sizes = head_dim, n_kv_heads // len(keys.table), n_heads // n_kv_heads
    return _launch(sizes, keys.sets, values.sets, keys.n_words, values.n_words, device)


@lru_cache(maxsize=1024)
def _launch(
    sizes: tuple[int, int, int], key_sets: tuple[int, ...], value_sets: tuple[int, ...], key_words: int,
    value_words: int, device: torch.device,
) -> _Launch | None:  # fmt: skip
    """Return the fastest for which there is room, None if there is none. key_words, value_words: of a block."""
    n_keys, n_values, room = sum(key_sets), sum(value_sets), _multiprocessors(device)[1]
    if not any(key_sets[1:] + value_sets[1:]):
        head_dim, group_heads, group_columns = sizes
        rows = _turn_rows(group_columns)
        queries = 64 * rows * (16 * n_keys + 1)  # 2 BATCH_WORDS
        queries += 2 * head_dim * (group_heads * group_columns + 2 * rows + 2 * group_heads)  # INPUT_WORDS
        slot = 4 * max(key_words, value_words)
        for warps in (4, 2, 1):
            slots = min(_MOST_SLOTS, min(_MOST_SLOT_BYTES, room - queries - 96 * warps) // (warps * slot))
            if slots >= 2:
                return _Launch(NUMBERS, warps, slots, warps * max(slots * slot, 1024 * n_values) + queries)
        return None
    beyond = 4 * 128 * (max(0, n_values - n_keys) + 1)  # BEYOND in cuda/attend.cu
    for warps, blocks in _LAUNCHES:
        stage = 4 * (blocks * (key_words + value_words + 12) + 128 * n_keys)  # STAGE_WORDS
        memory = warps * max(stage, 1024 * n_values) + beyond
        if memory + 96 * warps <= room:
            return _Launch(CODES, warps, blocks, memory)
    return None


@lru_cache(maxsize=1024)
def _best_splits(n_sequences: int, n_multiprocessors: int) -> int:
    """Return into how many parts each sequence is split, so that few multiprocessors are idle in the last round."""
    candidates = range(1, max(1, n_multiprocessors // n_sequences) + 8)

    # A split that fills a tenth of a percent more is not worth its sums.
    def busy(n: int) -> float:
        blocks = n * n_sequences
        return blocks / (-(-blocks // n_multiprocessors) * n_multiprocessors) - 0.001 * n

    return max(candidates, key=busy)


def _constants(
    keys: GroupedSite, values: GroupedSite, launch: _Launch, head_dim: int, group_heads: int, group_columns: int,
    masked: bool, dtype: torch.dtype,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    sets = {
        f"{part}{kind}": n
        for part, site in (("K", keys), ("V", values))
        for kind, n in zip("FNPS", site.layout.sets, strict=True)
    }
    named = {
        "HEAD_DIM": head_dim,
        "GROUP_HEADS": group_heads,
        "GROUP_COLUMNS": group_columns,
        **sets,
        "KEY_WORDS": keys.layout.n_words,
        "VALUE_WORDS": values.layout.n_words,
        "KEY_HOLES": int(keys.layout.has_holes),
        "VALUE_HOLES": int(values.layout.has_holes),
        "KEY_GAIN": int(keys.gain_word is not None),
        "VALUE_GAIN": int(values.gain_word is not None),
        "HAS_MASK": int(masked),
        "WARPS": launch.warps,
        "BLOCKS" if launch.names == CODES else "SLOTS": launch.per_warp,
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
    kernels[-1].set_shared_memory_config(_COMBINE_MEMORY)
    return [kernels[0], *(overlapping(kernel, device) for kernel in kernels[1:])]


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Return how many there are and the bytes of shared memory a block may have; where tests emulate, of an H100."""
    if device.type != "cuda":
        return 4, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, device=device)
