"""Second launch of a step: softmax weights of packed tokens, relative to the largest score of their group."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.kernels.unpack import gain, gain_words, line_place, operand, raw_tile


@triton.jit
def _add_class(
    acc, words, shifts, query, row_words, first_word, n_components, n_blocks, n_columns,
    BITS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of one class of components to the eight accumulators [4 BLOCKS, COLUMNS]."""
    acc = _scaled(acc, BITS, SMALL, 1)
    a0, a1, a2, a3, a4, a5, a6, a7 = acc
    for start in tl.range(0, n_components, WIDTH, num_stages=STAGES):
        raw = raw_tile(words, shifts, row_words, first_word, start, n_components, n_blocks, BITS, BLOCKS, WIDTH, True)
        row = start + tl.arange(0, WIDTH)
        place = query + row[:, None] * n_columns + tl.arange(0, COLUMNS)[None, :]
        q = tl.load(place, mask=(row < n_components)[:, None], other=0.0)
        a0 = tl.dot(operand(raw, 0, BITS, SMALL, ASM), q, a0)
        a1 = tl.dot(operand(raw, 1, BITS, SMALL, ASM), q, a1)
        a2 = tl.dot(operand(raw, 2, BITS, SMALL, ASM), q, a2)
        a3 = tl.dot(operand(raw, 3, BITS, SMALL, ASM), q, a3)
        a4 = tl.dot(operand(raw, 4, BITS, SMALL, ASM), q, a4)
        a5 = tl.dot(operand(raw, 5, BITS, SMALL, ASM), q, a5)
        a6 = tl.dot(operand(raw, 6, BITS, SMALL, ASM), q, a6)
        a7 = tl.dot(operand(raw, 7, BITS, SMALL, ASM), q, a7)
    result = (a0, a1, a2, a3, a4, a5, a6, a7)
    return _scaled(result, BITS, SMALL, -1)


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
def _scaled(acc, BITS: tl.constexpr, SMALL: tl.constexpr, SIGN: tl.constexpr):
    """Bring the accumulators to the scale of a class's codes (SIGN 1), or back (-1); see unpack.codes on SMALL."""
    result = acc
    if SMALL and BITS < 16:
        s0 = _times(acc[0], 0, BITS, SIGN)
        s1 = _times(acc[1], 1, BITS, SIGN)
        s2 = _times(acc[2], 2, BITS, SIGN)
        s3 = _times(acc[3], 3, BITS, SIGN)
        s4 = _times(acc[4], 4, BITS, SIGN)
        s5 = _times(acc[5], 5, BITS, SIGN)
        s6 = _times(acc[6], 6, BITS, SIGN)
        s7 = _times(acc[7], 7, BITS, SIGN)
        result = (s0, s1, s2, s3, s4, s5, s6, s7)
    return result


@triton.jit
def _to_score(acc, offset, scale, key_gains, TAU: tl.constexpr, KEY_GAIN: tl.constexpr):
    """Return scores of one place from its accumulator: scale undone, the codes' offsets taken off, the gains put on."""
    score = acc * scale - offset[None, :]
    if KEY_GAIN:
        score *= gain(key_gains, TAU)[:, None]
    return score


@triton.jit
def _add_mean(
    acc, mean_query, table, position, n_positions, n_columns,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add what the keys' mean, rotated to each token's position, adds to the scores."""
    a0, a1, a2, a3, a4, a5, a6, a7 = acc
    for start in tl.range(0, DIM, 32, num_stages=STAGES):
        part = start + tl.arange(0, 32)
        q = tl.load(mean_query + part[:, None] * n_columns + tl.arange(0, COLUMNS)[None, :])
        row = table + (position * DIM)[:, None] + part[None, :]
        # positions before the first and after the last are of tokens that do not count
        a0 = tl.dot(_angles(row, position, 0, n_positions, DIM), q, a0)
        a1 = tl.dot(_angles(row, position, 1, n_positions, DIM), q, a1)
        a2 = tl.dot(_angles(row, position, 2, n_positions, DIM), q, a2)
        a3 = tl.dot(_angles(row, position, 3, n_positions, DIM), q, a3)
        a4 = tl.dot(_angles(row, position, 4, n_positions, DIM), q, a4)
        a5 = tl.dot(_angles(row, position, 5, n_positions, DIM), q, a5)
        a6 = tl.dot(_angles(row, position, 6, n_positions, DIM), q, a6)
        a7 = tl.dot(_angles(row, position, 7, n_positions, DIM), q, a7)
    result = (a0, a1, a2, a3, a4, a5, a6, a7)
    return result


@triton.jit
def _angles(row, position, TAU: tl.constexpr, n_positions, DIM: tl.constexpr):
    known = (position + TAU >= 0) & (position + TAU < n_positions)
    return tl.load(row + TAU * DIM, mask=known[:, None], other=0.0)


@triton.jit
def _masked(score, token, first, last, mask_row, HAS_MASK: tl.constexpr):
    """Return scores with -inf at tokens outside [first, last) or masked; token: [4 BLOCKS]."""
    seen = (token >= first) & (token < last)
    if HAS_MASK:
        seen = seen & (tl.load(mask_row + token, mask=seen, other=0) != 0)
    return tl.where(seen[:, None], score, float("-inf"))


@triton.jit
def _weights(weight, weighted, score, top, place, value_gains, TAU: tl.constexpr, VALUE_GAIN: tl.constexpr):
    """Store exp2(score - top), times the values' gains, as float16 at `place`; add it to the two sums."""
    p = tl.exp2(score - top[None, :])
    if VALUE_GAIN:
        w = (p * gain(value_gains, TAU)[:, None]).to(tl.float16)
        weight += p
        weighted += w.to(tl.float32)
    else:
        w = p.to(tl.float16)
        weight += w.to(tl.float32)
    tl.store(place, w)
    return weight, weighted


@triton.jit
def _finish(
    acc, token, lo, hi, mask_row, place, step, top_at, sum_at, weighted_at, packed_at, value_gains,
    HAS_MASK: tl.constexpr, VALUE_GAIN: tl.constexpr,
):  # fmt: skip
    """Turn scores into stored weights, their largest score and their sums."""
    s0 = _masked(acc[0], token, lo, hi, mask_row, HAS_MASK)
    s1 = _masked(acc[1], token + 1, lo, hi, mask_row, HAS_MASK)
    s2 = _masked(acc[2], token + 2, lo, hi, mask_row, HAS_MASK)
    s3 = _masked(acc[3], token + 3, lo, hi, mask_row, HAS_MASK)
    high = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    s4 = _masked(acc[4], token + 4, lo, hi, mask_row, HAS_MASK)
    s5 = _masked(acc[5], token + 5, lo, hi, mask_row, HAS_MASK)
    s6 = _masked(acc[6], token + 6, lo, hi, mask_row, HAS_MASK)
    s7 = _masked(acc[7], token + 7, lo, hi, mask_row, HAS_MASK)
    high = tl.maximum(high, tl.maximum(tl.maximum(s4, s5), tl.maximum(s6, s7)))
    top = tl.max(high, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    sums = (tl.zeros_like(s0), tl.zeros_like(s0))
    sums = _weights(sums[0], sums[1], s0, safe, place, value_gains, 0, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s1, safe, place + step, value_gains, 1, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s2, safe, place + 2 * step, value_gains, 2, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s3, safe, place + 3 * step, value_gains, 3, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s4, safe, place + 4 * step, value_gains, 4, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s5, safe, place + 5 * step, value_gains, 5, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s6, safe, place + 6 * step, value_gains, 6, VALUE_GAIN)
    sums = _weights(sums[0], sums[1], s7, safe, place + 7 * step, value_gains, 7, VALUE_GAIN)
    total = tl.sum(sums[0], 0)
    tl.store(top_at, top)
    tl.store(sum_at, total)
    if VALUE_GAIN:
        tl.store(weighted_at, tl.sum(sums[1], 0))
    else:
        tl.store(weighted_at, total)
    tl.atomic_max(packed_at, top)


@triton.jit(
    do_not_specialize=[
        "key_gain_word", "value_gain_word", "n_positions", "n16", "n8", "n4", "n2", "n1", "n_blocks", "n_chunks",
        "n_tiles",
    ]
)  # fmt: skip
def score_kernel(
    query, bias, words, shifts, first, last, mask, value_words, mean_query, table, origin, rows, pages,
    weights, tops, sums, weighted_sums, packed_tops,
    batch_words, row_units, value_batch_words, value_row_words, key_gain_word, value_gain_word, n_positions, n_blocks,
    n_tiles, n_columns, n_chunks, mask_stride, pages_row, n16, n8, n4, n2, n1,
    ROW_UNIT: tl.constexpr, CLASSES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr, STAGES: tl.constexpr, HAS_MASK: tl.constexpr, KEY_GAIN: tl.constexpr, VALUE_GAIN: tl.constexpr,
    MEAN_DIM: tl.constexpr, SMALL: tl.constexpr, ASM: tl.constexpr, PAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BLOCKS blocks of one sequence, COLUMNS query columns (heads and query tokens).

    Grid: (n_tiles, column groups, batch). query: [batch, R, n_columns] float16, absorbed, in units of log2; bias:
    [n_chunks, batch, n_columns], summing to what the offsets of the codes add to every score. weights:
    [batch, n_tiles, 8, 4 BLOCKS, n_columns] float16, times the values' gains. tops, sums, weighted_sums:
    [batch, n_tiles, n_columns], a program's largest score, the sum of exp2 of all scores below it, and of its weights;
    packed_tops: [batch, n_columns], raised to the largest of all. mean_query: [batch, MEAN_DIM, n_columns]; table:
    [n_positions, MEAN_DIM], cosines and sines of each position; origin: [batch], the token at position 0. MEAN_DIM of
    0: keys have no mean. CLASSES: the bits of the components there are, added up. SMALL: see unpack.codes. PAGE_BLOCKS:
    0, or the blocks of a page, a multiple of BLOCKS: then rows lie in pages, batch_words and value_batch_words apart;
    rows: [batch], each entry's row of pages [rows, pages_row].
    """
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row_words = row_units * ROW_UNIT
    n_batch = tl.num_programs(2)
    TOKENS: tl.constexpr = BLOCKS * 32
    LINES: tl.constexpr = BLOCKS * 4
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = n16 + n8 + n4 + n2 + n1
    query += batch * total * n_columns + tl.program_id(1) * COLUMNS
    chunk = tl.arange(0, CHUNKS)
    at = bias + ((chunk * n_batch + batch) * n_columns)[:, None] + column[None, :]
    offset = tl.sum(tl.load(at, mask=(chunk < n_chunks)[:, None], other=0.0), 0)
    lo = tl.load(first + batch)
    hi = tl.load(last + batch)
    # A tile without a token that counts costs no more than writing its zeros.
    live = ((tile * TOKENS < hi) & (tile * TOKENS + TOKENS > lo)).to(tl.int32)
    if PAGE_BLOCKS:
        entry = pages + tl.load(rows + batch).to(tl.int64) * pages_row + tile * BLOCKS // PAGE_BLOCKS
        page = tl.load(entry, mask=live != 0, other=0).to(tl.int64)
        inside = tile * BLOCKS % PAGE_BLOCKS
        words += page * batch_words + inside * row_words
        value_words += page * value_batch_words + inside * value_row_words
        left = (hi + 31) // 32 - tile * BLOCKS
    else:
        words += batch * batch_words + tile.to(tl.int64) * BLOCKS * row_words
        value_words += batch * value_batch_words + tile.to(tl.int64) * BLOCKS * value_row_words
        left = n_blocks - tile * BLOCKS
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
                16 >> index, BLOCKS, 16 if index < 2 else WIDTH, COLUMNS, STAGES, SMALL, ASM,
            )  # fmt: skip
        word += count * (16 >> index)
        query += count * n_columns

    line = tl.arange(0, LINES)
    token = tile * TOKENS + line_place(line)
    key_gains = line
    if KEY_GAIN:
        key_gains = gain_words(words, row_words, key_gain_word, line, left)
    scale = 16777216.0 if SMALL else 1.0  # 2^24
    acc0 = _to_score(acc[0], offset, scale, key_gains, 0, KEY_GAIN)
    acc1 = _to_score(acc[1], offset, scale, key_gains, 1, KEY_GAIN)
    acc2 = _to_score(acc[2], offset, scale, key_gains, 2, KEY_GAIN)
    acc3 = _to_score(acc[3], offset, scale, key_gains, 3, KEY_GAIN)
    acc4 = _to_score(acc[4], offset, scale, key_gains, 4, KEY_GAIN)
    acc5 = _to_score(acc[5], offset, scale, key_gains, 5, KEY_GAIN)
    acc6 = _to_score(acc[6], offset, scale, key_gains, 6, KEY_GAIN)
    acc7 = _to_score(acc[7], offset, scale, key_gains, 7, KEY_GAIN)
    acc = (acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7)
    if MEAN_DIM:
        mean_query += batch * MEAN_DIM * n_columns + tl.program_id(1) * COLUMNS
        position = token - tl.load(origin + batch)
        acc = _add_mean(acc, mean_query, table, position, n_positions * live, n_columns, MEAN_DIM, COLUMNS, STAGES)
    value_gains = line
    if VALUE_GAIN:
        value_gains = gain_words(value_words, value_row_words, value_gain_word, line, left)
    row = (batch * n_tiles + tile) * (8 * LINES) + line
    own = batch * n_tiles + tile
    _finish(
        acc, token, lo, hi, mask + batch * mask_stride,
        weights + row[:, None] * n_columns + column[None, :], LINES * n_columns,
        tops + own * n_columns + column, sums + own * n_columns + column,
        weighted_sums + own * n_columns + column, packed_tops + batch * n_columns + column, value_gains,
        HAS_MASK, VALUE_GAIN,
    )  # fmt: skip
