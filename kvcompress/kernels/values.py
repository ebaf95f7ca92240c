"""Third launch of a step: weighted sums of the packed value codes, component by component."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.kernels.unpack import operand, raw_tile


@triton.jit
def _store_sums(
    sums, sum_stride, words, pages, shifts, weights, tops, top, page_words, row_words, first_word, component,
    n_components, n_blocks, first_tile, last_tile, n_columns, column,
    BITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, PAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Store the sums over tokens of weight times code, [WIDTH, COLUMNS], for WIDTH components of one class."""
    acc = tl.zeros([WIDTH, COLUMNS], tl.float32)
    before = top
    line = tl.arange(0, BLOCKS * 4)
    step = TILE * 4 * n_columns
    part_stride = row_words.to(tl.int64) * BLOCKS
    PARTS: tl.constexpr = TILE // BLOCKS
    for index in tl.range(first_tile * PARTS, last_tile * PARTS, num_stages=STAGES):
        if PAGE_BLOCKS:
            page = tl.load(pages + index * BLOCKS // PAGE_BLOCKS).to(tl.int64)
            part_words = words + page * page_words + index * BLOCKS % PAGE_BLOCKS * row_words
        else:
            part_words = words + part_stride * index
        left = n_blocks - index * BLOCKS
        raw = raw_tile(
            part_words, shifts, row_words, first_word, component, n_components, left, BITS, BLOCKS, WIDTH, False
        )
        tile = index // PARTS
        row = tile * (TILE * 32) + (index % PARTS) * (BLOCKS * 4)
        p = weights + row * n_columns + line[:, None] * n_columns + column[None, :]
        # The sums so far are brought to this tile's scale; 60 keeps them finite, and what it cuts off is below 2^-60.
        now = tl.maximum(tl.load(tops + tile * n_columns + column), top - 60.0)
        acc *= tl.exp2(before - now)[None, :]
        before = now
        acc = tl.dot(operand(raw, 0, BITS, False, ASM), tl.load(p), acc)
        acc = tl.dot(operand(raw, 1, BITS, False, ASM), tl.load(p + step), acc)
        acc = tl.dot(operand(raw, 2, BITS, False, ASM), tl.load(p + 2 * step), acc)
        acc = tl.dot(operand(raw, 3, BITS, False, ASM), tl.load(p + 3 * step), acc)
        acc = tl.dot(operand(raw, 4, BITS, False, ASM), tl.load(p + 4 * step), acc)
        acc = tl.dot(operand(raw, 5, BITS, False, ASM), tl.load(p + 5 * step), acc)
        acc = tl.dot(operand(raw, 6, BITS, False, ASM), tl.load(p + 6 * step), acc)
        acc = tl.dot(operand(raw, 7, BITS, False, ASM), tl.load(p + 7 * step), acc)
    row = component + tl.arange(0, WIDTH)
    place = sums + column[None, :] * sum_stride + row[:, None]
    tl.store(place, acc * tl.exp2(before - top)[None, :], mask=(row < n_components)[:, None])


@triton.jit(do_not_specialize=["n16", "n8", "n4", "n2", "n1", "n_blocks", "n_tiles", "tiles_per_split"])
def value_kernel(
    words, shifts, weights, tops, packed_tops, sums, last, rows, pages, batch_words, row_units, n_blocks, n_tiles,
    tiles_per_split, n_columns, sum_stride, pages_row, n16, n8, n4, n2, n1,
    ROW_UNIT: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, PAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: WIDTH components of one class, one split of one sequence, COLUMNS query columns.

    Grid: (splits, batch * column groups, chunks of components): programs that run at the same time mostly unpack the
    same number of bits, and so run the same code. weights, tops, packed_tops: of score_kernel.
    sums: [batch, splits, n_columns, sum_stride] float32, sum_stride >= R, of weights
    relative to the largest score of the sequence. last, rows, pages, PAGE_BLOCKS: see score_kernel.
    """
    groups = n_columns // COLUMNS
    batch = (tl.program_id(1) // groups).to(tl.int64)
    column = tl.program_id(1) % groups * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(0)
    row_words = row_units * ROW_UNIT
    if not PAGE_BLOCKS:
        words += batch * batch_words
    weights += batch * n_tiles * (TILE * 32) * n_columns
    tops += batch * n_tiles * n_columns
    sums += (batch * tl.num_programs(0) + split) * n_columns * sum_stride
    a = split * tiles_per_split
    z = tl.minimum(a + tiles_per_split, n_tiles)
    if PAGE_BLOCKS:  # rows after the last might never have been written
        n_blocks = (tl.load(last + batch) + 31) // 32
        z = tl.minimum(z, (n_blocks + TILE - 1) // TILE)
        pages += tl.load(rows + batch).to(tl.int64) * pages_row
    top = tl.load(packed_tops + batch * n_columns + column)
    top = tl.where(top == float("-inf"), 0.0, top)

    # Chunks never mix classes, so that a program unpacks one number of bits.
    chunk = tl.program_id(2)
    word = 0
    row = 0
    for index in tl.static_range(5):
        if CLASSES & (16 >> index):
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
            # Wide codes take half as many components at once, so that a stage of loads fits shared memory as well.
            per = WIDTH // 2 if index < 2 else WIDTH
            start = chunk * per
            if (start >= 0) & (start < count):
                if index < 2:
                    _store_sums(
                        sums + row, sum_stride, words, pages, shifts, weights, tops, top, batch_words, row_words, word,
                        start, count, n_blocks, a, z, n_columns, column,
                        16 >> index, WIDTH // 2, COLUMNS, TILE, 4, STAGES, ASM, PAGE_BLOCKS,
                    )  # fmt: skip
                elif count - start > WIDTH // 2:
                    _store_sums(
                        sums + row, sum_stride, words, pages, shifts, weights, tops, top, batch_words, row_words, word,
                        start, count, n_blocks, a, z, n_columns, column,
                        16 >> index, WIDTH, COLUMNS, TILE, BLOCKS, STAGES, ASM, PAGE_BLOCKS,
                    )  # fmt: skip
                else:
                    _store_sums(
                        sums + row, sum_stride, words, pages, shifts, weights, tops, top, batch_words, row_words, word,
                        start, count, n_blocks, a, z, n_columns, column,
                        16 >> index, WIDTH // 2, COLUMNS, TILE, BLOCKS, STAGES, ASM, PAGE_BLOCKS,
                    )  # fmt: skip
            chunk -= (count + per - 1) // per
            word += count * (16 >> index)
            row += count
