"""First kernel of decode attention: softmax weights of packed tokens, relative to the largest score of their tile."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.runtime.kernels.unpack import line_place, operand, raw_tile


@triton.jit
def _add_chunk(
    acc, words, shifts, query, row_words, first_word, start, n_components, n_blocks, n_columns,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of WIDTH components to the eight accumulators [4 BLOCKS, COLUMNS]."""
    raw = raw_tile(words, shifts, row_words, first_word, start, n_components, n_blocks, BITS, BLOCKS, WIDTH, True, WHOLE)
    row = start + tl.arange(0, WIDTH)
    place = query + row[:, None] * n_columns + tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        q = tl.load(place)
    else:
        q = tl.load(place, mask=(row < n_components)[:, None], other=0.0)
    a0 = tl.dot(operand(raw, 0, BITS, ASM), q, acc[0])
    a1 = tl.dot(operand(raw, 1, BITS, ASM), q, acc[1])
    a2 = tl.dot(operand(raw, 2, BITS, ASM), q, acc[2])
    a3 = tl.dot(operand(raw, 3, BITS, ASM), q, acc[3])
    a4 = tl.dot(operand(raw, 4, BITS, ASM), q, acc[4])
    a5 = tl.dot(operand(raw, 5, BITS, ASM), q, acc[5])
    a6 = tl.dot(operand(raw, 6, BITS, ASM), q, acc[6])
    a7 = tl.dot(operand(raw, 7, BITS, ASM), q, acc[7])
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _add_class(
    acc, words, shifts, query, row_words, first_word, n_components, n_blocks, n_columns,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of one class of components: whole chunks first, with unmasked and so wider loads."""
    whole = n_components // WIDTH * WIDTH
    for start in tl.range(0, whole, WIDTH, num_stages=STAGES):
        acc = _add_chunk(
            acc, words, shifts, query, row_words, first_word, start, n_components, n_blocks, n_columns,
            BITS, BLOCKS, WIDTH, COLUMNS, True, ASM,
        )  # fmt: skip
    if whole < n_components:
        acc = _add_chunk(
            acc, words, shifts, query, row_words, first_word, whole, n_components, n_blocks, n_columns,
            BITS, BLOCKS, WIDTH, COLUMNS, False, ASM,
        )  # fmt: skip
    return acc


@triton.jit
def _masked(acc, bias, token, TAU: tl.constexpr, first, last, mask_row, HAS_MASK: tl.constexpr):
    """Return scores with -inf at tokens outside [first, last) or masked; token: [4 BLOCKS], of place 0."""
    seen = (token + TAU >= first) & (token + TAU < last)
    if HAS_MASK:
        seen = seen & (tl.load(mask_row + token + TAU, mask=seen, other=0) != 0)
    return tl.where(seen[:, None], acc - bias[None, :], float("-inf"))


@triton.jit
def _weights(score, top, place):
    """Store exp2(score - top) as float16 at `place` and return what was stored."""
    p = tl.exp2(score - top[None, :]).to(tl.float16)
    tl.store(place, p)
    return p.to(tl.float32)


@triton.jit(do_not_specialize=["n16", "n8", "n4", "n2", "n1", "n_blocks", "n_chunks", "n_tiles"])
def score_kernel(
    query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
    batch_words, row_units, n_blocks, n_tiles, n_columns, n_chunks, mask_stride, n16, n8, n4, n2, n1,
    ROW_UNIT: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, HAS_MASK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BLOCKS blocks of one sequence, COLUMNS query columns (heads and query tokens).

    query: [batch, R, n_columns] float16, absorbed, in units of log2; bias: [n_chunks, batch, n_columns], summing to
    what the offsets of the codes add to every score. weights: [batch, n_tiles, 8, 4 BLOCKS, n_columns] float16.
    tops, sums: [batch, n_tiles, n_columns], a tile's largest score and the sum of its weights;
    packed_tops: [batch, n_columns], raised to the largest score of all tiles.
    """
    tile = tl.program_id(0)
    TOKENS: tl.constexpr = BLOCKS * 32
    LINES: tl.constexpr = BLOCKS * 4
    batch = tl.program_id(2).to(tl.int64)
    n_batch = tl.num_programs(2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_words = row_units * ROW_UNIT
    words += batch * batch_words + tile.to(tl.int64) * BLOCKS * row_words
    left = n_blocks - tile * BLOCKS
    total = n16 + n8 + n4 + n2 + n1
    query += batch * total * n_columns + tl.program_id(1) * COLUMNS
    lo = tl.load(first + batch)
    hi = tl.load(last + batch)
    # A tile without a token that counts costs no more than writing its zeros.
    live = ((tile * TOKENS < hi) & (tile * TOKENS + TOKENS > lo)).to(tl.int32)
    zero = tl.zeros([LINES, COLUMNS], tl.float32)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero)
    word = 0
    for index in tl.static_range(5):
        if index == 0:
            count = n16
        elif index == 1:
            count = n8
        elif index == 2:
            count = n4
        elif index == 3:
            count = n2
        else:
            count = n1
        if CLASSES & (16 >> index):
            acc = _add_class(
                acc, words, shifts, query, row_words, word, count * live, left, n_columns,
                16 >> index, BLOCKS, 16 if index < 2 else WIDTH, COLUMNS, STAGES, ASM,
            )  # fmt: skip
        word += count * (16 >> index)
        query += count * n_columns

    offset = tl.zeros([COLUMNS], tl.float32)
    for chunk in range(0, n_chunks):
        offset += tl.load(bias + (chunk * n_batch + batch) * n_columns + column)
    mask_row = mask + batch * mask_stride
    line = tl.arange(0, LINES)
    token = tile * TOKENS + line_place(line)
    s0 = _masked(acc[0], offset, token, 0, lo, hi, mask_row, HAS_MASK)
    s1 = _masked(acc[1], offset, token, 1, lo, hi, mask_row, HAS_MASK)
    s2 = _masked(acc[2], offset, token, 2, lo, hi, mask_row, HAS_MASK)
    s3 = _masked(acc[3], offset, token, 3, lo, hi, mask_row, HAS_MASK)
    s4 = _masked(acc[4], offset, token, 4, lo, hi, mask_row, HAS_MASK)
    s5 = _masked(acc[5], offset, token, 5, lo, hi, mask_row, HAS_MASK)
    s6 = _masked(acc[6], offset, token, 6, lo, hi, mask_row, HAS_MASK)
    s7 = _masked(acc[7], offset, token, 7, lo, hi, mask_row, HAS_MASK)
    low = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    high = tl.maximum(tl.maximum(s4, s5), tl.maximum(s6, s7))
    top = tl.max(tl.maximum(low, high), 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    entry = batch * n_tiles + tile
    place = weights + entry * TOKENS * n_columns + line[:, None] * n_columns + column[None, :]
    step = LINES * n_columns
    weight = _weights(s0, safe, place)
    weight += _weights(s1, safe, place + step)
    weight += _weights(s2, safe, place + 2 * step)
    weight += _weights(s3, safe, place + 3 * step)
    weight += _weights(s4, safe, place + 4 * step)
    weight += _weights(s5, safe, place + 5 * step)
    weight += _weights(s6, safe, place + 6 * step)
    weight += _weights(s7, safe, place + 7 * step)
    tl.store(tops + entry * n_columns + column, top)
    tl.atomic_max(packed_tops + batch * n_columns + column, top)
    tl.store(sums + entry * n_columns + column, tl.sum(weight, 0))
