"""Reading packed words in Triton: raw words of a tile, and codes as float16 matrix operands.

A tile is a few blocks of 32 tokens. Each block's tokens are taken as 4 quarters of 8: a line of the tile (a row or a
column of a matrix operand) stands for one quarter of one block, and there is one matrix product for each place
tau = 0..7 in the quarter. So every class of bits has the same token order, and each quarter of a component is `bits`
whole bytes of a row. Lines are ordered (block // 4, low or high quarter of a half, block % 4, half), which leaves the
two bytes of a half word in one thread's registers.

A code of b bits becomes float16 in one logic and one multiply-add instruction for two of them: its bits are put in
the mantissa of 1024 (0x6400), and 1024 is subtracted. Codes are used as they are, from 0; the callers subtract
2^(b-1) - 1/2 after the products.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes(halves, SHIFT: tl.constexpr, BITS: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr):
    """Return bits SHIFT .. SHIFT + BITS of each int16 as float16. ASM: two at a time, with NVIDIA instructions.

    SMALL: as subnormal numbers, the bits left where they are: code * 2^(bit - 24), one instruction less.
    """
    if SMALL:
        if SHIFT + BITS > 10:
            place: tl.constexpr = SHIFT - 8
        else:
            place: tl.constexpr = SHIFT
        mask = tl.full(halves.shape, ((1 << BITS) - 1) << place, tl.int16)
        if ASM and SHIFT + BITS > 10:
            low = tl.inline_asm_elementwise(
                "shr.u32 $0, $1, 8;", "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2
            )
        elif SHIFT + BITS > 10:
            low = halves >> 8
        else:
            low = halves
        if ASM:
            result = tl.inline_asm_elementwise(
                "and.b32 $0, $1, $2;", "=r,r,r", [low, mask], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            result = (low & mask).to(tl.float16, bitcast=True)
    elif ASM:
        if SHIFT + BITS > 10:  # beyond the mantissa
            low = tl.inline_asm_elementwise(
                "shr.u32 $0, $1, 8;", "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2
            )
            place: tl.constexpr = SHIFT - 8
        else:
            low = halves
            place: tl.constexpr = SHIFT
        mask = tl.full(low.shape, ((1 << BITS) - 1) << place, tl.int16)
        scale = tl.full(low.shape, 1.0 / (1 << place), tl.float16)
        bias = tl.full(low.shape, -1024.0 / (1 << place), tl.float16)
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $1, $2, 0x64006400, 0xEA; fma.rn.f16x2 $0, t, $3, $4; }",
            "=r,r,r,r,r",
            [low, mask, scale, bias],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        result = ((halves >> SHIFT) & ((1 << BITS) - 1)).to(tl.float16)
    return result


@triton.jit
def operand(raw, TAU: tl.constexpr, BITS: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr):
    """Return the codes of the tokens at place TAU of their quarters, from what `raw_tile` gave."""
    if BITS == 1:
        result = codes(raw[0], TAU, 1, SMALL, ASM)
    elif BITS == 2:
        result = codes(raw[0], 2 * TAU, 2, SMALL, ASM)
    elif BITS == 4:
        half = (raw[0] >> (16 * (TAU // 4))).to(tl.int16)
        result = codes(half, 4 * (TAU % 4), 4, SMALL, ASM)
    elif BITS == 8:
        half = (raw[TAU // 4] >> (16 * (TAU // 2 % 2))).to(tl.int16)
        result = codes(half, 8 * (TAU % 2), 8, SMALL, ASM)
    else:
        half = (raw[TAU // 2] >> (16 * (TAU % 2))).to(tl.int16)
        result = half.to(tl.float16, bitcast=True)
    return result


@triton.jit
def line_place(line):
    """Return the token of place 0 that a line of a tile stands for, counted from the tile's first token."""
    block = line // 16 * 4 + line // 2 % 4
    quarter = line % 2 * 2 + line // 8 % 2
    return block * 32 + quarter * 8


@triton.jit
def _arranged(x, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """[BLOCKS, WIDTH * 4 * WORDS] -> a tuple of WORDS tensors [BLOCKS * 4, WIDTH] or [WIDTH, BLOCKS * 4]."""
    shaped = x.reshape(BLOCKS // 4, 4, WIDTH, 2, 2, WORDS)
    if TOKENS_FIRST:
        turned = shaped.permute(0, 4, 1, 3, 2, 5)
        rows: tl.constexpr = BLOCKS * 4
        columns: tl.constexpr = WIDTH
    else:
        turned = shaped.permute(2, 0, 4, 1, 3, 5)
        rows: tl.constexpr = WIDTH
        columns: tl.constexpr = BLOCKS * 4
    if WORDS == 1:
        result = (turned.reshape(rows, columns),)
    elif WORDS == 2:
        result = tl.split(turned.reshape(rows, columns, 2))
    else:
        even, odd = tl.split(turned.reshape(rows, columns, 2, 2))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        result = (w0, w1, w2, w3)
    return result


@triton.jit
def raw_tile(
    words, shifts, row_words, first_word, component, n_components, n_blocks,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return the raw integers of WIDTH components from `component` on, for BLOCKS blocks: a tuple for `operand`.

    words: the first block's row; shifts: [0, 8] in memory (a computed constant would be laid out apart from what is
    loaded, and every operand would pass through shared memory); row_words: words from block to
    block; first_word: where the class starts in a row. Components from n_components and blocks from
    n_blocks on read as zeros.
    """
    # A quarter of a component is BITS bytes: a byte of an int16, an int16, an int32, or 2 or 4 of them.
    WORDS: tl.constexpr = BITS // 4 if BITS > 4 else 1
    UNITS: tl.constexpr = 2 if BITS == 1 else 4 * WORDS
    base = words + first_word
    stride = row_words
    if BITS < 4:
        base = base.to(tl.pointer_type(tl.int16))
        stride = row_words * 2
    block = tl.arange(0, BLOCKS)
    column = component * UNITS + tl.arange(0, WIDTH * UNITS)
    mask = (block < n_blocks)[:, None] & (column < n_components * UNITS)[None, :]
    loaded = tl.load(base + (block * stride)[:, None] + column[None, :], mask=mask, other=0)
    if BITS == 1:
        shift = tl.load(shifts + tl.arange(0, 2))
        loaded = loaded[:, :, None] >> shift[None, None, :]
    return _arranged(loaded, BLOCKS, WIDTH, WORDS, TOKENS_FIRST)


@triton.jit
def gain_words(words, row_words, gain_word, line, n_blocks):
    """Return each line's 8 gains as one word of 4-bit codes; words: the tile's first row."""
    place = line_place(line)
    block = place // 32
    return tl.load(words + block * row_words + gain_word + place % 32 // 8, mask=block < n_blocks, other=0)


@triton.jit
def gain(packed, TAU: tl.constexpr):
    """Return the gains of place TAU from what `gain_words` gave."""
    code = (packed >> (4 * TAU)) & 15
    return tl.exp2((code.to(tl.float32) - 4.0) * 0.25)
