"""Decode attention over keys un-rotated turn by turn: three CUDA launches, compiled by NVRTC for a layer's layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvcompress.options import QUAD
from kvcompress.runtime.kernels.arguments import ExactTokens
from kvcompress.runtime.kernels.launch import overlapping
from kvcompress.runtime.kernels.layout import BLOCK_TOKENS, LEVELS

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
_PREPARE_WARPS = 4
_RING = 4
_EXACT_TOKENS = 32
_COMBINE_THREADS = 1024


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Where a tiled row (docs/format.md) holds what of each group of heads.

    table: [groups, 6] int32: the group's first word and its words; where in them nibbles, pairs and single bits begin;
    its float16 components. sets: of 32 components, the most of any group, of float16 numbers, nibbles, pairs, single
    bits. n_words: of the largest group, rounded up, so that layers share compiled kernels. has_holes: whether some
    group has fewer float16 components than its sets. rows: [groups, 32 * sum(sets)], the decoder's row of each
    component, -1 if there is none; factors: what it is to be multiplied by, 16 for the high nibbles of 8-bit ones.
    """

    table: Tensor
    sets: tuple[int, ...]
    n_words: int
    has_holes: bool
    rows: Tensor
    factors: Tensor


def group_layout(bits: list[int], group: list[int], n_groups: int) -> GroupLayout | None:
    """Return the layout of components of these bits and groups, or None if they are no whole quads of a group."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, (b, g) in enumerate(zip(bits, group, strict=True)):
        found.setdefault((g, b), []).append(row)
    if not bits or any(b not in LEVELS or len(rows) % QUAD for (_, b), rows in found.items()):
        return None
    # Of every group the decoder's rows of its four classes, and their factors.
    kinds = (((16, 1),), ((8, 16), (8, 1), (4, 1)), ((2, 1),), ((1, 1),))
    classes = [
        [[(row, factor) for b, factor in kind for row in found.get((g, b), [])] for kind in kinds]
        for g in range(n_groups)
    ]
    sets = tuple(max(-(-len(of[i]) // 32) for of in classes) for i in range(len(kinds)))
    table, word = [], 0
    for of in classes:
        n_numbers, nibbles, pairs, singles = (width * len(own) for width, own in zip((16, 4, 2, 1), of, strict=True))
        n = n_numbers + nibbles + pairs + singles
        table.append([word, n, n_numbers, n_numbers + nibbles, n - singles, len(of[0])])
        word += n
    padded = [
        [p for own, n in zip(of, sets, strict=True) for p in own + [(-1, 0)] * (32 * n - len(own))] for of in classes
    ]
    rows, factors = torch.tensor(padded).reshape(n_groups, -1, 2).unbind(2)
    n_words = -(-max(entry[1] for entry in table) // 64) * 64
    has_holes = any(entry[5] != 32 * sets[0] for entry in table)
    return GroupLayout(torch.tensor(table, dtype=torch.int32), sets, n_words, has_holes, rows, factors)


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


def head_decoders(decoder: Tensor, layout: GroupLayout, n_kv_heads: int) -> Tensor:
    """Return of a decoder [R, n] each head's columns of its group's rows: [KV heads, 32 * sets, head_dim] float16."""
    heads = decoder.unflatten(1, (n_kv_heads, -1)).transpose(0, 1)  # [KV heads, R, head_dim]
    group = torch.arange(n_kv_heads) // (n_kv_heads // len(layout.table))
    rows, factors = (x[group].to(decoder.device) for x in (layout.rows, layout.factors))
    own = heads.gather(1, rows.clamp_min(0).unsqueeze(2).expand(-1, -1, heads.shape[2]))
    return (own.float() * factors.unsqueeze(2)).half().contiguous()


def decoder_fragments(decoders: Tensor, n_numbers: int) -> Tensor:
    """Return `head_decoders` as the matrix units take them: [KV heads, sets, 4, head_dim / 16, 32 lanes, 4] float16.

    Lane 4 r + c holds of column r of each of a set's four tiles 4 neighbouring dimensions, and so for every step; a
    lane's dimensions are c's eighth of a head and the eighth that RoPE rotates with it. Columns are such that a lane's
    results are those that it stores: of codes the quads c and c + 4, of float16 numbers (the first n_numbers sets)
    the pairs c, c + 4, c + 8 and c + 12.
    """
    _, n_components, head_dim = decoders.shape
    lane, tile = torch.arange(32), torch.arange(4)[:, None]
    r, c = lane // 4, lane % 4
    of_codes = 4 * (r // 2 + 4 * (tile // 2)) + 2 * (tile % 2) + r % 2  # [tile, lane]
    n_sets = n_components // 32
    component = torch.where((torch.arange(n_sets) < n_numbers)[:, None, None], 8 * tile + r, of_codes)
    component = component + 32 * torch.arange(n_sets)[:, None, None]  # [set, tile, lane]
    step = torch.arange(head_dim // 16)
    half, place = step // (head_dim // 32), step % (head_dim // 32)
    start = half[:, None] * (head_dim // 2) + place[:, None] * 4 + c * (head_dim // 8)  # [step, lane]
    dims = start[..., None] + torch.arange(4)  # [step, lane, 4]
    device = decoders.device
    return decoders[:, component.to(device)[:, :, None, :, None], dims.to(device)].contiguous()


def applies(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, device: torch.device
) -> bool:
    """Return whether the kernels take these sizes."""
    if len(keys.table) != len(values.table) or n_kv_heads % len(keys.table) or head_dim not in (64, 96, 128, 256):
        return False
    if n_heads // len(keys.table) > MOST_COLUMNS or min(sum(keys.sets), sum(values.sets)) == 0:
        return False
    return max(sum(keys.sets), sum(values.sets)) <= MOST_SETS and _launch_of(keys, values, device) is not None


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
    n_kv_heads, n_groups = exact.keys.shape[1], len(keys.layout.table)
    group_columns, group_heads = n_heads // n_kv_heads, n_kv_heads // n_groups
    device = query.device
    n_turns = -(-n_blocks * BLOCK_TOKENS // turn)
    launch = _launch_of(keys.layout, values.layout, device)
    assert launch is not None  # see applies
    turn_shift, unit_shift = ((turn // n).bit_length() - 1 for n in (UNIT_TOKENS, BLOCK_TOKENS * launch.blocks))
    constants = _constants(keys, values, launch, head_dim, group_heads, group_columns, mask is not None, query.dtype)
    prepare, attend, combine = _kernels(constants, launch.memory, device)
    query = query if query.stride(3) == 1 else query.contiguous()

    columns, key_sets, value_sets = group_heads * group_columns, sum(keys.layout.sets), sum(values.layout.sets)
    # Columns of no query are computed as well, so that they must hold numbers.
    new = torch.empty if columns == MOST_COLUMNS else torch.zeros
    absorbed = new(batch, n_turns, n_groups, key_sets, 128, dtype=torch.int32, device=device)
    biases = new(batch, n_turns, n_groups, MOST_COLUMNS, 4, device=device)
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
            query, keys.maps, no_mean, angles, last, absorbed, biases, exact.sink_keys, exact.sink_values,
            exact.keys, exact.values, nothing if exact.mask is None else exact.mask, exact_sums, exact_stats, batch,
            n_turns, n_kv_heads, turn_shift, angles.stride(0) // 2 if angles.shape[0] > 1 else 0,
            exact.sink_keys.shape[2], exact.keys.shape[2], int(exact.mask is not None), *query.stride()[:2],
            *exact.sink_keys.stride()[:3], *exact.keys.stride()[:3], *exact.values.stride()[:3],
            scaling * 1.4426950408889634,
        ],
        max(_exact_bytes(head_dim, group_columns), _RING * head_dim * 32),
    )  # fmt: skip
    if n_splits is None:
        n_splits = _best_splits(batch * n_groups, _multiprocessors(device)[0])
    n_splits = min(n_splits, -(-n_blocks * BLOCK_TOKENS // UNIT_TOKENS))
    stats = torch.empty(batch, n_groups, n_splits, 3, MOST_COLUMNS, device=device)
    sums = torch.empty(batch, n_groups, n_splits, 32 * value_sets, MOST_COLUMNS, device=device)
    attend(
        (n_splits, n_groups, batch), (32 * launch.warps, 1, 1),
        [
            keys.words, values.words, keys.layout.table, values.layout.table, absorbed, biases, first, last,
            nothing if mask is None else mask, stats, sums, n_blocks, n_turns, unit_shift,
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
            stats, sums, exact_sums, exact_stats, values.maps, nothing if values.mean is None else values.mean, out,
            n_splits, exact_parts, out.stride(0), out.stride(2), int(values.mean is not None),
        ],
        4 * group_columns * (n_splits + exact_parts + 32 * value_sets + parts * head_dim),
    )  # fmt: skip
    return out


def _exact_bytes(head_dim: int, group_columns: int) -> int:
    """Return the bytes that attend_exact in turned.cu shares: scores, queries, values, and keys or partial sums."""
    key_stride = head_dim + (0 if head_dim % 64 else 32)
    keys = max(2 * _EXACT_TOKENS * key_stride, 4 * group_columns * 128 * _PREPARE_WARPS)
    return group_columns * (4 * _EXACT_TOKENS + 2 * head_dim) + 2 * _EXACT_TOKENS * head_dim + keys


@dataclass(frozen=True, slots=True)
class _Launch:
    """How `attend` is launched: warps of a thread block, of which a multiprocessor has one, packed blocks that each
    takes at once, and the bytes of shared memory."""

    warps: int
    blocks: int
    memory: int


def _launch_of(keys: GroupLayout, values: GroupLayout, device: torch.device) -> _Launch | None:
    return _launch(sum(keys.sets), sum(values.sets), keys.n_words + values.n_words, device)


@lru_cache(maxsize=1024)
def _launch(key_sets: int, value_sets: int, n_words: int, device: torch.device) -> _Launch | None:
    """Return the fastest for which there is room, None if there is none. n_words: of keys and values of a block."""
    room = _multiprocessors(device)[1]
    beyond = 4 * 128 * (max(0, value_sets - key_sets) + 1)  # BEYOND in turned.cu
    for warps, blocks in _LAUNCHES:
        stage = 4 * (blocks * (n_words + 12) + 128 * key_sets)  # STAGE_WORDS
        memory = warps * max(stage, 1024 * value_sets) + beyond
        if memory + 96 * warps <= room:
            return _Launch(warps, blocks, memory)
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
        "BLOCKS": launch.blocks,
        "QUERY_BF16": int(dtype == torch.bfloat16),
    }
    return tuple(named.items())


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
    """Return how many there are and the bytes of shared memory a block may have; where tests emulate, of an H100."""
    if device.type != "cuda":
        return 4, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, device=device)
