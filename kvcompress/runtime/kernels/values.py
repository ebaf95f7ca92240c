"""Second kernel of decode attention: weighted sums of the packed value codes, component by component."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.runtime.kernels.unpack import operand, raw_tile


@triton.jit
def largest(tops, n_tiles, n_columns, column, COLUMNS: tl.constexpr):
    """Return the largest score of each column over all tiles, and 0 where all are masked."""
    best = tl.full([32, COLUMNS], float("-inf"), tl.float32)
    for start in range(0, n_tiles, 32):
        tile = start + tl.arange(0, 32)
        place = tops + tile[:, None] * n_columns + column[None, :]
        best = tl.maximum(best, tl.load(place, mask=(tile < n_tiles)[:, None], other=float("-inf")))
    top = tl.max(best, 0)
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _class_sums(
    words, weights, tops, top, row_words, first_word, component, n_components, n_blocks, first_tile, last_tile,
    n_columns, column, BITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return sum over tokens of weight times code, [WIDTH, COLUMNS], for WIDTH components of one class."""
    acc = tl.zeros([WIDTH, COLUMNS], tl.float32)
    line = tl.arange(0, BLOCKS * 4)
    step = 64 * n_columns
    part_stride = row_words.to(tl.int64) * BLOCKS
    PARTS: tl.constexpr = 16 // BLOCKS
    for index in tl.range(first_tile * PARTS, last_tile * PARTS, num_stages=STAGES):
        part_words = words + part_stride * index
        left = n_blocks - index * BLOCKS
        raw = raw_tile(part_words, row_words, first_word, component, n_components, left, BITS, BLOCKS, WIDTH, False, False)
        tile = index // PARTS
        row = tile * 512 + (index % PARTS) * (BLOCKS * 4)
        p = weights + row * n_columns + line[:, None] * n_columns + column[None, :]
        part = tl.dot(operand(raw, 0, BITS, ASM), tl.load(p))
        part = tl.dot(operand(raw, 1, BITS, ASM), tl.load(p + step), part)
        part = tl.dot(operand(raw, 2, BITS, ASM), tl.load(p + 2 * step), part)
        part = tl.dot(operand(raw, 3, BITS, ASM), tl.load(p + 3 * step), part)
        part = tl.dot(operand(raw, 4, BITS, ASM), tl.load(p + 4 * step), part)
        part = tl.dot(operand(raw, 5, BITS, ASM), tl.load(p + 5 * step), part)
        part = tl.dot(operand(raw, 6, BITS, ASM), tl.load(p + 6 * step), part)
        part = tl.dot(operand(raw, 7, BITS, ASM), tl.load(p + 7 * step), part)
        share = tl.exp2(tl.load(tops + tile * n_columns + column) - top)
        acc += part * share[None, :]
    return acc


@triton.jit(do_not_specialize=["n16", "n8", "n4", "n2", "n1", "n_blocks", "n_tiles", "tiles_per_split"])
def value_kernel(
    words, weights, tops, sums, batch_words, row_units, n_blocks, n_tiles, tiles_per_split, n_columns,
    n16, n8, n4, n2, n1,
    ROW_UNIT: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: WIDTH components of one class, one split of one sequence, COLUMNS query columns.

    Grid: (chunks of components, splits, batch * column groups). weights, tops: of score_kernel.
    sums: [batch, splits, R, n_columns] float32, of weights relative to the largest score of the sequence.
    """
    groups = n_columns // COLUMNS
    batch = (tl.program_id(2) // groups).to(tl.int64)
    column = tl.program_id(2) % groups * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    row_words = row_units * ROW_UNIT
    words += batch * batch_words
    weights += batch * n_tiles * 512 * n_columns
    tops += batch * n_tiles * n_columns
    total = n16 + n8 + n4 + n2 + n1
    sums += (batch * tl.num_programs(1) + split) * total * n_columns
    a = split * tiles_per_split
    z = tl.minimum(a + tiles_per_split, n_tiles)
    top = largest(tops, n_tiles, n_columns, column, COLUMNS)

    # Chunks never mix classes, so that a program unpacks one number of bits.
    chunk = tl.program_id(0)
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
            start = chunk * WIDTH
            if (start >= 0) & (start < count):
                acc = _class_sums(
                    words, weights, tops, top, row_words, word, start, count, n_blocks, a, z, n_columns, column,
                    16 >> index, WIDTH, COLUMNS, 4 if index < 2 else BLOCKS, STAGES, ASM,
                )  # fmt: skip
                component = start + tl.arange(0, WIDTH)
                place = sums + (row + component)[:, None] * n_columns + column[None, :]
                tl.store(place, acc, mask=(component < count)[:, None])
            chunk -= (count + WIDTH - 1) // WIDTH
            word += count * (16 >> index)
            row += count
