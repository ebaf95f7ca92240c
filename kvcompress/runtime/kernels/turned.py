"""Decode attention over keys un-rotated turn by turn: three CUDA launches, compiled by NVRTC for a layer's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvcompress.runtime.kernels.arguments import ExactTokens
from kvcompress.runtime.kernels.launch import overlapping
from kvcompress.runtime.kernels.layout import BLOCK_TOKENS, LEVELS

#: Columns of one product of the matrix units: query heads of a group of KV heads.
MOST_COLUMNS = 8
#: More chunks of 16 value components than this do not fit a thread's registers.
MOST_CHUNKS = 20
#: Recent tokens beside the packed ones, at most: reading more of them would take longer than what is packed.
MOST_EXACT = 1024
#: Tokens that a warp takes at once; a turn is a multiple.
UNIT_TOKENS = 128
_PREPARE_WARPS = 4
_EXACT_TOKENS = 32
_RING = 4
_COMBINE_THREADS = 1024


@dataclass(frozen=True, slots=True)
class GroupedSite:
    """One site of the packed cache whose components mix the heads of one group only.

    words: [batch, n_blocks, n_words] int32. classes: [groups, 5, 3] int32, for each group and 16, 8, 4, 2 and 1 bits
    where its components begin in a row (words) and in the decoder (rows), and how many there are. chunks: of 16
    components, the most of any group for each of those bits. decoder: [n_components, n] float16, steps folded in.
    mean: [n] float32: of values, or of keys before RoPE. gain_word: where in a row the gains begin, None without gains.
    fragments: of keys, the decoder as `decoder_fragments` arranges it.
    """

    words: Tensor
    classes: Tensor
    chunks: tuple[int, ...]
    decoder: Tensor
    mean: Tensor | None
    gain_word: int | None
    fragments: Tensor | None = None


def class_table(bits: list[int], group: list[int], n_groups: int) -> tuple[Tensor, tuple[int, ...]] | None:
    """Return `classes` and `chunks` of GroupedSite for components in stored order, or None if groups are interleaved.

    bits, group: of every component; bits are falling, and groups rise among equal bits.
    """
    table = torch.zeros(n_groups, len(LEVELS), 3, dtype=torch.int32)
    word = 0
    for row, (b, g) in enumerate(zip(bits, group, strict=True)):
        if b not in LEVELS or (row and (bits[row - 1] < b or (bits[row - 1] == b and group[row - 1] > g))):
            return None
        entry = table[g, LEVELS.index(b)]
        if entry[2] == 0:
            entry[0], entry[1] = word, row
        entry[2] += 1
        word += b
    return table, tuple((-(-table[:, :, 2] // 16)).amax(0).tolist())


def decoder_fragments(decoder: Tensor, classes: Tensor, chunks: tuple[int, ...], n_kv_heads: int) -> Tensor:
    """Return a decoder [R, n] as the matrix units take it: [KV heads, chunks, 2, head_dim / 16, 32 lanes, 4] float16.

    Lane 4 r + c holds of component r // 2 + 4 (r % 2) of each half of a chunk 4 neighbouring dimensions, and so for
    every step; a lane's dimensions are c's eighth of a head and the eighth that RoPE rotates with it.
    """
    head_dim = decoder.shape[1] // n_kv_heads
    group_heads = n_kv_heads // classes.shape[0]
    rows = torch.full((classes.shape[0], sum(chunks), 16), -1, dtype=torch.long)
    for g, table in enumerate(classes.tolist()):
        first = 0
        for (_, row, count), n in zip(table, chunks, strict=True):
            rows[g, first : first + n].view(-1)[:count] = torch.arange(row, row + count)
            first += n
    lane = torch.arange(32)
    r, c = lane // 4, lane % 4
    component = torch.arange(2)[:, None] * 8 + r // 2 + 4 * (r % 2)  # [2, lane]
    step = torch.arange(head_dim // 16)
    half, place = step // (head_dim // 32), step % (head_dim // 32)
    start = half[:, None] * (head_dim // 2) + place[:, None] * 4 + c * (head_dim // 8)  # [step, lane]
    dims = start[..., None] + torch.arange(4)  # [step, lane, 4]
    padded = torch.cat([decoder, decoder.new_zeros(1, decoder.shape[1])])  # row -1
    heads = []
    for head in range(n_kv_heads):
        own = padded[:, head * head_dim : (head + 1) * head_dim]
        of_lane = rows[head // group_heads][:, component].to(decoder.device)  # [chunk, 2, lane]
        heads.append(own[of_lane[:, :, None, :, None], dims.to(decoder.device)])
    return torch.stack(heads).contiguous()


def applies(
    n_heads: int,
    n_kv_heads: int,
    group_heads: int,
    head_dim: int,
    key_chunks: tuple[int, ...],
    value_chunks: tuple[int, ...],
) -> bool:
    """Return whether the kernels take these sizes."""
    columns = group_heads * (n_heads // n_kv_heads)
    chunks = sum(key_chunks), sum(value_chunks)
    return columns <= MOST_COLUMNS and head_dim in (64, 96, 128, 256) and min(chunks) > 0 and chunks[1] <= MOST_CHUNKS


@lru_cache(maxsize=64)
def compiler_works(device: torch.device) -> bool:
    """Return whether this is a GPU that has what the kernels need, and this torch an NVRTC that compiles for it."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _compiled('extern "C" __global__ void attend() {}', device)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return False
    return True


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
    n_kv_heads, n_groups = exact.keys.shape[1], keys.classes.shape[0]
    group_columns, group_heads = n_heads // n_kv_heads, n_kv_heads // n_groups
    device, n_units = query.device, -(-n_blocks * BLOCK_TOKENS // UNIT_TOKENS)
    turn_shift = (turn // UNIT_TOKENS).bit_length() - 1
    n_turns = -(-n_units >> turn_shift)
    launch = _launch(keys.chunks, values.chunks, device)
    constants = _constants(keys, values, launch, head_dim, group_heads, group_columns, mask is not None, query.dtype)
    prepare, attend, combine = _kernels(constants, launch.memory, device)
    query = query if query.stride(3) == 1 else query.contiguous()

    columns, key_chunks, value_chunks = group_heads * group_columns, sum(keys.chunks), sum(values.chunks)
    # Columns of no query are computed as well, so that they must hold numbers.
    new = torch.empty if columns == MOST_COLUMNS else torch.zeros
    absorbed = new(batch, n_turns, n_groups, key_chunks, 64, dtype=torch.int32, device=device)
    biases = new(batch, n_turns, n_groups, MOST_COLUMNS, 2, device=device)
    exact_parts = -(-(exact.sink_keys.shape[2] + exact.keys.shape[2]) // _EXACT_TOKENS)
    exact_sums = torch.empty(batch, n_kv_heads, exact_parts, group_columns, head_dim, device=device)
    exact_stats = torch.empty(batch, n_kv_heads, exact_parts, group_columns, 2, device=device)
    rows = 1 << (group_columns - 1).bit_length()
    tasks = batch * n_kv_heads * -(-n_turns * rows // (16 * _PREPARE_WARPS))
    nothing = query
    no_mean = keys.mean if keys.mean is not None else _zeros(n_kv_heads * head_dim, device)
    prepare(
        (batch * n_kv_heads * exact_parts + tasks, 1, 1), (32 * _PREPARE_WARPS, 1, 1),
        [
            query, keys.fragments, no_mean, angles, last, absorbed, biases, exact.sink_keys, exact.sink_values,
            exact.keys, exact.values, nothing if exact.mask is None else exact.mask, exact_sums, exact_stats, batch,
            n_turns, n_kv_heads, turn_shift, angles.stride(0) // 2 if angles.shape[0] > 1 else 0,
            exact.sink_keys.shape[2], exact.keys.shape[2], int(exact.mask is not None), *query.stride()[:2],
            *exact.sink_keys.stride()[:3], *exact.keys.stride()[:3], *exact.values.stride()[:3],
            scaling * 1.4426950408889634,
        ],
        max(_exact_bytes(head_dim, group_columns), _RING * head_dim * 32),
    )  # fmt: skip
    if n_splits is None:
        n_splits = max(1, launch.blocks * _multiprocessors(device)[0] // (batch * n_groups))
    n_splits = min(n_splits, n_units)
    stats = torch.empty(batch, n_groups, n_splits, 3, MOST_COLUMNS, device=device)
    sums = torch.empty(batch, n_groups, n_splits, 16 * value_chunks, MOST_COLUMNS, device=device)
    attend(
        (n_splits, n_groups, batch), (32 * launch.warps, 1, 1),
        [
            keys.words, values.words, keys.classes, values.classes, absorbed, biases, first, last,
            nothing if mask is None else mask, stats, sums, n_blocks, n_turns, turn_shift,
            keys.words.stride(1), values.words.stride(1), keys.words.stride(0) // keys.words.stride(1),
            values.words.stride(0) // values.words.stride(1), keys.gain_word or 0, values.gain_word or 0,
            0 if mask is None else mask.stride(0),
        ],
        launch.memory,
    )  # fmt: skip
    out = torch.empty(batch, 1, n_heads, head_dim, dtype=query.dtype, device=device)
    parts = max(1, _COMBINE_THREADS // head_dim)
    combine(
        (n_kv_heads, batch, 1), (_COMBINE_THREADS, 1, 1),
        [
            stats, sums, exact_sums, exact_stats, values.decoder, nothing if values.mean is None else values.mean,
            values.classes, out, n_splits, exact_parts, values.decoder.stride(0), out.stride(0), out.stride(2),
            int(values.mean is not None),
        ],
        4 * group_columns * (n_splits + exact_parts + 16 * value_chunks + parts * head_dim),
    )  # fmt: skip
    return out


def _exact_bytes(head_dim: int, group_columns: int) -> int:
    """Return the bytes that attend_exact in turned.cu shares: scores, queries, values, and keys or partial sums."""
    key_stride = head_dim + (0 if head_dim % 64 else 32)
    keys = max(2 * _EXACT_TOKENS * key_stride, 4 * group_columns * 128 * _PREPARE_WARPS)
    return group_columns * (4 * _EXACT_TOKENS + 2 * head_dim) + 2 * _EXACT_TOKENS * head_dim + keys


@dataclass(frozen=True, slots=True)
class _Launch:
    """How `attend` is launched. blocks: thread blocks on a multiprocessor; memory: bytes of shared memory of each."""

    warps: int
    blocks: int
    memory: int

    @property
    def staged(self) -> bool:
        return self.memory > 0


@lru_cache(maxsize=1024)
def _launch(key_chunks: tuple[int, ...], value_chunks: tuple[int, ...], device: torch.device) -> _Launch:
    """Pass units through shared memory where that leaves room for enough warps to keep the matrix units busy."""
    each = _stage_bytes(key_chunks, value_chunks)
    own = 1024 + 512 * sum(value_chunks) + 512  # of a block, beside
    fit = _multiprocessors(device)[1]
    for warps, blocks in ((8, 2), (10, 1), (8, 1), (6, 1)):
        if blocks * (warps // 2 * each + own) <= fit:
            return _Launch(warps, blocks, warps // 2 * each)
    return _Launch(4, 2, 0)


def _stage_bytes(key_chunks: tuple[int, ...], value_chunks: tuple[int, ...]) -> int:
    """Return the bytes of STAGE_WORDS in turned.cu."""

    def block(chunks: tuple[int, ...]) -> int:
        pieces = sum(4 * n * bits + 1 for n, bits in zip(chunks, LEVELS, strict=True) if n)
        return pieces + (12 - pieces % 8) % 8

    return 4 * 16 * (block(key_chunks) + block(value_chunks)) + 256 * sum(key_chunks)


def _constants(
    keys: GroupedSite, values: GroupedSite, launch: _Launch, head_dim: int, group_heads: int, group_columns: int,
    masked: bool, dtype: torch.dtype,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    chunks = {
        f"{part}{bits}": n
        for part, site in (("K", keys), ("V", values))
        for bits, n in zip(LEVELS, site.chunks, strict=True)
    }
    named = {
        "HEAD_DIM": head_dim,
        "GROUP_HEADS": group_heads,
        "GROUP_COLUMNS": group_columns,
        **chunks,
        "KEY_GAIN": int(keys.gain_word is not None),
        "VALUE_GAIN": int(values.gain_word is not None),
        "HAS_MASK": int(masked),
        "WARPS": launch.warps,
        "MIN_BLOCKS": launch.blocks,
        "STAGED_UNITS": int(launch.staged),
        "ALWAYS_CLAMP": int(any(_overrun(site) >= site.words.stride(1) for site in (keys, values))),
        "QUERY_BF16": int(dtype == torch.bfloat16),
    }
    return tuple(named.items())


def _overrun(site: GroupedSite) -> int:
    """Return how many words beyond a row's components reading whole chunks may reach, at most."""
    return max((16 * n * bits for bits, n in zip(LEVELS, site.chunks, strict=True)), default=0)


@lru_cache(maxsize=1024)
def _kernels(constants: tuple[tuple[str, int], ...], memory: int, device: torch.device) -> tuple[Any, Any, Any]:
    source = "".join(f"#define {name} {value}\n" for name, value in constants)
    module = _compiled(source + files(__package__).joinpath("turned.cu").read_text(encoding="utf-8"), device)
    module.attend.set_shared_memory_config(memory)
    return module.prepare, overlapping(module.attend, device), overlapping(module.combine, device)


def _compiled(source: str, device: torch.device) -> Any:
    """Return a module of CUDA kernels, through the NVRTC that torch brings along (since 2.9)."""
    from torch.cuda import _utils

    with torch.cuda.device(device):
        binary, _ = _utils._nvrtc_compile(source, "attend")
        return _utils._cuda_load_module(binary)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Return how many there are and the bytes of shared memory of one; where tests emulate, four of an H100."""
    if device.type != "cuda":
        return 4, 233472
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


@lru_cache(maxsize=64)
def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, device=device)
