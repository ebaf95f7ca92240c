"""The tile layout (docs/format.md) and a codec's maps as the CUDA kernels for turns take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.tiles import CLASSES
from kvcompress.kernels.layout import LEVELS
from kvcompress.options import QUAD


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
    classes = [
        [[(row, factor) for b, factor in kinds for row in found.get((g, b), [])] for kinds in CLASSES]
        for g in range(n_groups)
    ]
    sets = tuple(max(-(-len(of[i]) // 32) for of in classes) for i in range(len(CLASSES)))
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


def head_decoders(decoder: Tensor, layout: GroupLayout, n_kv_heads: int) -> Tensor:
    """Return of a decoder [R, n] each head's columns of its group's rows: [KV heads, 32 * sets, head_dim] float16."""
    heads = decoder.unflatten(1, (n_kv_heads, -1)).transpose(0, 1)  # [KV heads, R, head_dim]
    group = torch.arange(n_kv_heads) // (n_kv_heads // len(layout.table))
    rows, factors = (x[group].to(decoder.device) for x in (layout.rows, layout.factors))
    own = heads.gather(1, rows.clamp_min(0).unsqueeze(2).expand(-1, -1, heads.shape[2]))
    return (own.float() * factors.unsqueeze(2)).half().contiguous()


def largest_rows(decoders: Tensor, layout: GroupLayout) -> Tensor:
    """Return the norm of the longest row that codes are multiplied by, of each head of `head_decoders`: [KV heads]."""
    rows = decoders[:, 32 * layout.sets[0] : 32 * sum(layout.sets)].float()
    return rows.norm(dim=2).amax(1) if rows.shape[1] else torch.zeros(len(rows), device=rows.device)


def decoder_fragments(decoders: Tensor, n_numbers: int) -> Tensor:
    """Return `head_decoders` as the matrix units take them: [KV heads, sets, 4, head_dim / 32, 32 lanes, 2, 4] float16.

    Lane 4 r + c holds of column r of each of a set's four tiles 4 neighbouring dimensions for each step, two steps side
    by side; a lane's dimensions are c's eighth of a head and the eighth that RoPE rotates with it. Columns are such
    that a lane's results are those that it stores: of codes the quads c and c + 4, of float16 numbers (the first
    n_numbers sets) the pairs c, c + 4, c + 8 and c + 12.
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
    steps = decoders[:, component.to(device)[:, :, None, :, None], dims.to(device)]
    return steps.unflatten(3, (-1, 2)).transpose(4, 5).contiguous()
