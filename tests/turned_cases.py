"""Random sites of a cache in the tile layout, and what their codes stand for, read as docs/format.md has them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.kernels.group_layout import GroupLayout, decoder_fragments, group_layout, head_decoders, largest_rows
from kvcompress.kernels.turned import GroupedSite


def random_site(
    part: str, batch: int, n_blocks: int, counts: dict[int, list[int]], kv_heads: int, head_dim: int, gain: bool
) -> tuple[GroupedSite, Tensor, Tensor]:
    """Return a site of random codes, what they stand for, z [batch, n_tokens, R] float64, and its decoder [R, n]."""
    n_groups, width = len(next(iter(counts.values()))), kv_heads * head_dim
    bits = [b for b in sorted(counts, reverse=True) for n in counts[b] for _ in range(n)]
    group = [g for b in sorted(counts, reverse=True) for g, n in enumerate(counts[b]) for _ in range(n)]
    layout = group_layout(bits, group, n_groups)
    assert layout is not None
    words = torch.randint(-(2**31), 2**31 - 1, (batch, n_blocks, sum(bits) + 4 * gain), dtype=torch.int32)
    for first, _, nibbles, _, _, n_numbers in layout.table.tolist():
        if n_numbers:
            numbers = torch.randn(batch, n_blocks, 2 * nibbles).half().view(torch.int32)
            words[..., first : first + nibbles] = numbers
    decoder, share = torch.zeros(len(bits), width), width // n_groups
    for row, (b, g) in enumerate(zip(bits, group, strict=True)):
        size = (2.0 ** (1 - b) if b < 16 else 1.0) / group.count(g) ** 0.5
        decoder[row, g * share : (g + 1) * share] = torch.randn(share) * size
    decoder = decoder.half()
    maps = head_decoders(decoder, layout, kv_heads)
    largest = largest_rows(maps, layout)
    if part == "key":
        maps = decoder_fragments(maps, layout.sets[0])
    gain_word = sum(bits) if gain else None
    z = unpacked(part, words, bits, group, layout, gain_word)
    return GroupedSite(words, layout, maps, torch.randn(width), gain_word, largest), z, decoder


def place(part: str, width: int, i: int, token: Tensor) -> tuple[Tensor, Tensor]:
    """Return word and shift of codes of `width` bits, component i of a class and group, as docs/format.md has them."""
    quad, comp, t, h = i // 4, i % 4, token // 16, token // 8 % 2
    if part == "key":
        r = token % 8
        if width == 16:
            pair = i // 2
            return 32 * pair + (r + 2 * pair) % 8 * 4 + 2 * t + h, 16 * (comp % 2) + 0 * t
        if width == 4:
            return 16 * quad + 2 * (r ^ (4 if quad & 2 else 0)) + t, 8 * comp + 4 * h
        if width == 2:
            return 8 * quad + r, 8 * comp + 2 * t + 4 * h
        return 4 * quad + r // 2, 8 * comp + 4 * h + 2 * (r % 2) + t
    c, b, j = token % 8 // 2, token % 2, comp // 2
    if width == 16:
        return 64 * quad + 16 * ((2 * j + t) ^ (quad & 1)) + 4 * c + comp % 2 + 2 * h, 16 * b
    byte = 8 * (2 * h + b)
    if width == 4:
        return 16 * quad + 4 * c + 2 * t + j, byte + 4 * (comp % 2)
    if width == 2:
        return 8 * quad + 2 * c + t, byte + 2 * comp
    return 4 * quad + c, byte + 4 * t + comp


def unpacked(
    part: str, words: Tensor, bits: list[int], group: list[int], layout: GroupLayout, gain_word: int | None
) -> Tensor:
    token = torch.arange(32)
    rows = words.long() & 0xFFFFFFFF

    def codes(start: int, width: int, i: int) -> Tensor:  # [batch, n_tokens]
        word, shift = place(part, width, i, token)
        return (rows[..., start + word] >> shift & (1 << width) - 1).flatten(1)

    z: list[Tensor] = []
    for row, (b, g) in enumerate(zip(bits, group, strict=True)):
        first, _, nibbles, pairs, singles, _ = layout.table[g].tolist()
        own = [i for i in range(len(bits)) if group[i] == g and bits[i] == b].index(row)
        n_8 = sum(1 for i in range(len(bits)) if group[i] == g and bits[i] == 8)
        if b == 16:
            z.append(codes(first, 16, own).to(torch.int16).view(torch.half).double())
            continue
        if b == 8:
            code = 16 * codes(first + nibbles, 4, own) + codes(first + nibbles, 4, n_8 + own)
        elif b == 4:
            code = codes(first + nibbles, 4, 2 * n_8 + own)
        else:
            code = codes(first + (pairs if b == 2 else singles), b, own)
        z.append(code.double() - (2.0 ** (b - 1) - 0.5))
    gains = torch.ones(1)
    if gain_word is not None:
        gains = torch.exp2(((rows[..., gain_word + token // 8] >> 4 * (token % 8) & 15).flatten(1).double() - 4) / 4)
    return torch.stack(z, -1) * gains.unsqueeze(-1)
