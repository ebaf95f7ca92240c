"""Second launch of a step: softmax weights of packed tokens, relative to the largest score of their group."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.runtime.kernels.unpack import begin_after, line_place, operand, raw_tile


@triton.jit
def _add_class(
    acc, words, shifts, query, row_words, first_word, n_components, n_blocks, n_columns,
    BITS: tl.constexpr, FIRST: tl.constexpr, PLACES: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of one class of components to the PLACES accumulators [4 BLOCKS, COLUMNS]."""
    acc = _scaled(acc, BITS, FIRST, PLACES, SMALL, 1)
    a0, a1, a2, a3 = acc[0], acc[1], acc[2], acc[3]
    if PLACES == 8:
        a4, a5, a6, a7 = acc[4], acc[5], acc[6], acc[7]
    for start in tl.range(0, n_components, WIDTH, num_stages=STAGES):
        raw = raw_tile(words, shifts, row_words, first_word, start, n_components, n_blocks, BITS, BLOCKS, WIDTH, True)
        row = start + tl.arange(0, WIDTH)
        place = query + row[:, None] * n_columns + tl.arange(0, COLUMNS)[None, :]
        q = tl.load(place, mask=(row < n_components)[:, None], other=0.0)
        a0 = tl.dot(operand(raw, FIRST, BITS, SMALL, ASM), q, a0)
        a1 = tl.dot(operand(raw, FIRST + 1, BITS, SMALL, ASM), q, a1)
        a2 = tl.dot(operand(raw, FIRST + 2, BITS, SMALL, ASM), q, a2)
        a3 = tl.dot(operand(raw, FIRST + 3, BITS, SMALL, ASM), q, a3)
        if PLACES == 8:
            a4 = tl.dot(operand(raw, 4, BITS, SMALL, ASM), q, a4)
            a5 = tl.dot(operand(raw, 5, BITS, SMALL, ASM), q, a5)
            a6 = tl.dot(operand(raw, 6, BITS, SMALL, ASM), q, a6)
            a7 = tl.dot(operand(raw, 7, BITS, SMALL, ASM), q, a7)
    if PLACES == 8:
        result = (a0, a1, a2, a3, a4, a5, a6, a7)
    else:
        result = (a0, a1, a2, a3)
    return _scaled(result, BITS, FIRST, PLACES, SMALL, -1)


@triton.jit
def _times(x, TAU: tl.constexpr, BITS: tl.constexpr, SIGN: tl.constexpr):
    """Return x * 2^(SIGN * bit), where bit is how far a code of place TAU lies above the lowest in `operand`."""
    bit: tl.constexpr = TAU * BITS % 16 - (8 if TAU * BITS % 16 + BITS > 10 else 0)
    if bit == 0:
        result = x
    elif SIGN > 0:
        result = x * (1 << bit)
    else:
        result = x * (1.0 / (1 << bit))
    return result


@triton.jit
def _scaled(
    acc, BITS: tl.constexpr, FIRST: tl.constexpr, PLACES: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr
):
    """Bring the accumulators to the scale of a class's codes (SIGN 1), or back (-1); see unpack.codes on SMALL."""
    result = acc
    if SMALL and BITS < 16:
        s0 = _times(acc[0], FIRST, BITS, SIGN)
        s1 = _times(acc[1], FIRST + 1, BITS, SIGN)
        s2 = _times(acc[2], FIRST + 2, BITS, SIGN)
        s3 = _times(acc[3], FIRST + 3, BITS, SIGN)
        if PLACES == 8:
            s4 = _times(acc[4], 4, BITS, SIGN)
            s5 = _times(acc[5], 5, BITS, SIGN)
            s6 = _times(acc[6], 6, BITS, SIGN)
            s7 = _times(acc[7], 7, BITS, SIGN)
            result = (s0, s1, s2, s3, s4, s5, s6, s7)
        else:
            result = (s0, s1, s2, s3)
    return result


@triton.jit
def _masked(acc, scale, bias, token, first, last, mask_row, HAS_MASK: tl.constexpr):
    """Return acc * scale - bias with -inf at tokens outside [first, last) or masked; token: [4 BLOCKS]."""
    seen = (token >= first) & (token < last)
    if HAS_MASK:
        seen = seen & (tl.load(mask_row + token, mask=seen, other=0) != 0)
    return tl.where(seen[:, None], acc * scale - bias[None, :], float("-inf"))


@triton.jit
def _weights(score, top, place):
    """Store exp2(score - top) as float16 at `place` and return what was stored."""
    p = tl.exp2(score - top[None, :]).to(tl.float16)
    tl.store(place, p)
    return p.to(tl.float32)


@triton.jit
def _finish(
    acc, scale, offset, token, lo, hi, mask_row, place, step, top_at, sum_at, packed_at,
    PLACES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Turn accumulators into stored weights, their largest score and their sum."""
    s0 = _masked(acc[0], scale, offset, token, lo, hi, mask_row, HAS_MASK)
    s1 = _masked(acc[1], scale, offset, token + 1, lo, hi, mask_row, HAS_MASK)
    s2 = _masked(acc[2], scale, offset, token + 2, lo, hi, mask_row, HAS_MASK)
    s3 = _masked(acc[3], scale, offset, token + 3, lo, hi, mask_row, HAS_MASK)
    high = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    if PLACES == 8:
        s4 = _masked(acc[4], scale, offset, token + 4, lo, hi, mask_row, HAS_MASK)
        s5 = _masked(acc[5], scale, offset, token + 5, lo, hi, mask_row, HAS_MASK)
        s6 = _masked(acc[6], scale, offset, token + 6, lo, hi, mask_row, HAS_MASK)
        s7 = _masked(acc[7], scale, offset, token + 7, lo, hi, mask_row, HAS_MASK)
        high = tl.maximum(high, tl.maximum(tl.maximum(s4, s5), tl.maximum(s6, s7)))
    top = tl.max(high, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = _weights(s0, safe, place)
    weight += _weights(s1, safe, place + step)
    weight += _weights(s2, safe, place + 2 * step)
    weight += _weights(s3, safe, place + 3 * step)
    if PLACES == 8:
        weight += _weights(s4, safe, place + 4 * step)
        weight += _weights(s5, safe, place + 5 * step)
        weight += _weights(s6, safe, place + 6 * step)
        weight += _weights(s7, safe, place + 7 * step)
    tl.store(top_at, top)
    tl.store(sum_at, tl.sum(weight, 0))
    tl.atomic_max(packed_at, top)


@triton.jit
def _score(
    query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
    batch, tile, batch_words, row_words, n_blocks, n_tiles, n_columns, n_chunks, mask_stride, n16, n8, n4, n2, n1,
    FIRST: tl.constexpr, PLACES: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, HAS_MASK: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    n_batch = tl.num_programs(2)
    TOKENS: tl.constexpr = BLOCKS * 32
    LINES: tl.constexpr = BLOCKS * 4
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    words += batch * batch_words + tile.to(tl.int64) * BLOCKS * row_words
    left = n_blocks - tile * BLOCKS
    total = n16 + n8 + n4 + n2 + n1
    query += batch * total * n_columns + tl.program_id(1) * COLUMNS
    chunk = tl.arange(0, CHUNKS)
    at = bias + ((chunk * n_batch + batch) * n_columns)[:, None] + column[None, :]
    offset = tl.sum(tl.load(at, mask=(chunk < n_chunks)[:, None], other=0.0), 0)
    lo = tl.load(first + batch)
    hi = tl.load(last + batch)
    # A tile without a token that counts costs no more than writing its zeros.
    live = ((tile * TOKENS < hi) & (tile * TOKENS + TOKENS > lo)).to(tl.int32)
    zero = tl.zeros([LINES, COLUMNS], tl.float32)
    if PLACES == 8:
        acc = (zero, zero, zero, zero, zero, zero, zero, zero)
    else:
        acc = (zero, zero, zero, zero)
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
                16 >> index, FIRST, PLACES, BLOCKS, 16 if index < 2 else WIDTH, COLUMNS, STAGES, SMALL, ASM,
            )  # fmt: skip
        word += count * (16 >> index)
        query += count * n_columns

    line = tl.arange(0, LINES)
    row = (batch * n_tiles + tile) * (8 * LINES) + FIRST * LINES + line
    entry = (batch * n_tiles + tile) * (8 // PLACES) + FIRST // PLACES
    _finish(
        acc, 16777216.0 if SMALL else 1.0, offset, tile * TOKENS + line_place(line) + FIRST, lo, hi, mask + batch * mask_stride,
        weights + row[:, None] * n_columns + column[None, :], LINES * n_columns,
        tops + entry * n_columns + column, sums + entry * n_columns + column, packed_tops + batch * n_columns + column,
        PLACES, HAS_MASK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n16", "n8", "n4", "n2", "n1", "n_blocks", "n_chunks", "n_tiles"])
def score_kernel(
    query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
    batch_words, row_units, n_blocks, n_tiles, n_columns, n_chunks, mask_stride, n16, n8, n4, n2, n1,
    ROW_UNIT: tl.constexpr, CLASSES: tl.constexpr, PLACES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, HAS_MASK: tl.constexpr, SMALL: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: PLACES of the 8 places of a tile of BLOCKS blocks, COLUMNS query columns (heads and query tokens).

    Grid: (n_tiles * 8 / PLACES, column groups, batch). query: [batch, R, n_columns] float16, absorbed, in units of
    log2; bias: [n_chunks, batch, n_columns], summing to what the offsets of the codes add to every score.
    weights: [batch, n_tiles, 8, 4 BLOCKS, n_columns] float16. tops, sums: [batch, n_tiles, 8 / PLACES, n_columns], a
    program's largest score and the sum of its weights; packed_tops: [batch, n_columns], raised to the largest of all.
    """
    begin_after(PDL)
    batch = tl.program_id(2).to(tl.int64)
    row_words = row_units * ROW_UNIT
    if PLACES == 8:
        _score(
            query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
            batch, tl.program_id(0), batch_words, row_words, n_blocks, n_tiles, n_columns, n_chunks, mask_stride,
            n16, n8, n4, n2, n1, 0, 8, CLASSES, BLOCKS, COLUMNS, CHUNKS, WIDTH, STAGES, HAS_MASK, SMALL, ASM,
        )  # fmt: skip
    elif tl.program_id(0) % 2 == 0:
        _score(
            query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
            batch, tl.program_id(0) // 2, batch_words, row_words, n_blocks, n_tiles, n_columns, n_chunks, mask_stride,
            n16, n8, n4, n2, n1, 0, 4, CLASSES, BLOCKS, COLUMNS, CHUNKS, WIDTH, STAGES, HAS_MASK, SMALL, ASM,
        )  # fmt: skip
    else:
        _score(
            query, bias, words, shifts, first, last, mask, weights, tops, sums, packed_tops,
            batch, tl.program_id(0) // 2, batch_words, row_words, n_blocks, n_tiles, n_columns, n_chunks, mask_stride,
            n16, n8, n4, n2, n1, 4, 4, CLASSES, BLOCKS, COLUMNS, CHUNKS, WIDTH, STAGES, HAS_MASK, SMALL, ASM,
        )  # fmt: skip
