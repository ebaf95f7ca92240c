"""Reading packed words in Triton: raw words of a tile, and codes as float16 matrix operands.

A tile is 16 blocks of 32 tokens. Each block's tokens are taken as 4 quarters of 8: a matrix row (or column) stands
for one quarter of one block, 64 in a tile, and one matrix product for each place tau = 0..7 in the quarter. So every
class of bits has the same token order, and each quarter of a component is `bits` whole bytes of a row.

A code of b bits becomes float16 in one logic and one multiply-add instruction for two of them: its bits are put in
the mantissa of 1024 (0x6400), and 1024 is subtracted. Codes are used as they are, from 0; the callers subtract
2^(b-1) - 1/2 after the products.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes(halves, SHIFT: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return bits SHIFT .. SHIFT + BITS of each int16 as float16. ASM: two at a time, with NVIDIA instructions."""
    if ASM:
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
def operand(raw, TAU: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Return the codes of the tokens at place TAU of their quarters, from what `raw_tile` gave."""
    if BITS == 1:
        result = codes(raw[0].to(tl.int16), TAU, 1, ASM)
    elif BITS == 2:
        result = codes(raw[0], 2 * TAU, 2, ASM)
    elif BITS == 4:
        half = (raw[0] >> (16 * (TAU // 4))).to(tl.int16)
        result = codes(half, 4 * (TAU % 4), 4, ASM)
    elif BITS == 8:
        half = (raw[TAU // 4] >> (16 * (TAU // 2 % 2))).to(tl.int16)
        result = codes(half, 8 * (TAU % 2), 8, ASM)
    else:
        half = (raw[TAU // 2] >> (16 * (TAU % 2))).to(tl.int16)
        result = half.to(tl.float16, bitcast=True)
    return result


@triton.jit
def _arranged(x, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """[BLOCKS, WIDTH * 4] -> [BLOCKS * 4, WIDTH] or [WIDTH, BLOCKS * 4]."""
    if TOKENS_FIRST:
        result = x.reshape(BLOCKS, WIDTH, 4).permute(0, 2, 1).reshape(BLOCKS * 4, WIDTH)
    else:
        result = x.reshape(BLOCKS, WIDTH, 4).permute(1, 0, 2).reshape(WIDTH, BLOCKS * 4)
    return result


@triton.jit
def raw_tile(
    words,
    row_words,
    first_word,
    component,
    n_components,
    n_blocks,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return the raw integers of WIDTH components from `component` on, for BLOCKS blocks: a tuple for `operand`.

    words: the first block's row; row_words: words from block to block; first_word: where the class starts in a row.
    Components from n_components and blocks from n_blocks on read as zeros. WHOLE: there are no such components.
    """
    block = tl.arange(0, BLOCKS)
    column = component * 4 + tl.arange(0, WIDTH * 4)
    mask = (block < n_blocks)[:, None]
    if not WHOLE:
        mask = mask & (column < n_components * 4)[None, :]
    if BITS == 1:
        base = (words + first_word).to(tl.pointer_type(tl.uint8))
        place = (block * (row_words * 4))[:, None] + column[None, :]
        raw = (_arranged(tl.load(base + place, mask=mask, other=0), BLOCKS, WIDTH, TOKENS_FIRST),)
    elif BITS == 2:
        base = (words + first_word).to(tl.pointer_type(tl.int16))
        place = (block * (row_words * 2))[:, None] + column[None, :]
        raw = (_arranged(tl.load(base + place, mask=mask, other=0), BLOCKS, WIDTH, TOKENS_FIRST),)
    elif BITS == 4:
        place = (block * row_words + first_word)[:, None] + column[None, :]
        raw = (_arranged(tl.load(words + place, mask=mask, other=0), BLOCKS, WIDTH, TOKENS_FIRST),)
    elif BITS == 8:
        place = (block * row_words + first_word)[:, None] + column[None, :] * 2
        low = tl.load(words + place, mask=mask, other=0)
        high = tl.load(words + place + 1, mask=mask, other=0)
        raw = (_arranged(low, BLOCKS, WIDTH, TOKENS_FIRST), _arranged(high, BLOCKS, WIDTH, TOKENS_FIRST))
    else:
        place = (block * row_words + first_word)[:, None] + column[None, :] * 4
        w0 = tl.load(words + place, mask=mask, other=0)
        w1 = tl.load(words + place + 1, mask=mask, other=0)
        w2 = tl.load(words + place + 2, mask=mask, other=0)
        w3 = tl.load(words + place + 3, mask=mask, other=0)
        raw = (
            _arranged(w0, BLOCKS, WIDTH, TOKENS_FIRST),
            _arranged(w1, BLOCKS, WIDTH, TOKENS_FIRST),
            _arranged(w2, BLOCKS, WIDTH, TOKENS_FIRST),
            _arranged(w3, BLOCKS, WIDTH, TOKENS_FIRST),
        )
    return raw
