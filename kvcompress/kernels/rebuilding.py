"""Triton kernels that turn packed rows back into keys and values: codes to latents, and what follows the decoder."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_block", "n_blocks", "n_columns", "gain_word"])
def latents_kernel(
    words, pages, places, levels, out, first_block, n_blocks, n_columns, gain_word, page_words, row_words,
    PAGE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Latents of n_blocks blocks of a sequence's packed tokens, from first_block on.

    out: float16 [groups, n_blocks * 32, n_columns].
    words: [pages, PAGE_BLOCKS, row_words], page_words apart; pages: int32, those of the sequence; places: int32
    [groups, 32, n_columns], 32 * word + bit of each token's code; levels: float32 [groups, 3, n_columns], the largest
    code of a column (65535: a float16 number), what a code is multiplied by, and what is then taken off. Grid:
    (blocks / BLOCKS, columns / WIDTH, groups).
    """
    group = tl.program_id(2)
    token = tl.arange(0, 32)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = (column < n_columns)[None, :] & (token >= 0)[:, None]
    place = tl.load(places + (group * 32 + token[:, None]) * n_columns + column[None, :], mask=real, other=0)
    level = levels + group * 3 * n_columns + column
    most = tl.load(level, mask=column < n_columns, other=0.0).to(tl.int32)[None, :]
    size = tl.load(level + n_columns, mask=column < n_columns, other=0.0)[None, :]
    offset = tl.load(level + 2 * n_columns, mask=column < n_columns, other=0.0)[None, :]
    word, shift = place // 32, place % 32
    for i in range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        there = real & (0 * token + block < n_blocks)[:, None]
        own = first_block + tl.minimum(block, n_blocks - 1)
        page = tl.load(pages + own // PAGE_BLOCKS).to(tl.int64)
        row = words + page * page_words + own % PAGE_BLOCKS * row_words
        code = (tl.load(row + word, mask=there, other=0) >> shift) & most
        number = (code & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        z = tl.where(most == 65535, number, code.to(tl.float32) * size - offset)
        if HAS_GAIN:
            gain = (tl.load(row + gain_word + token // 8) >> (token % 8 * 4)) & 15
            z = z * tl.exp2((gain.to(tl.float32) - 4.0) * 0.25)[:, None]
        to = out + ((group * n_blocks + block).to(tl.int64) * 32 + token[:, None]) * n_columns + column[None, :]
        tl.store(to, tl.minimum(tl.maximum(z, -65504.0), 65504.0).to(tl.float16), mask=there)


@triton.jit(do_not_specialize=["first_token", "turn", "n_tokens"])
def heads_kernel(
    x, mean, inv_freq, out, first_token, turn, n_tokens, x_group, x_token, out_token, out_head, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROTATED: tl.constexpr, MEAN_ONLY: tl.constexpr,
    HAS_MEAN: tl.constexpr, GROUP_HEADS: tl.constexpr, ONE_TURN: tl.constexpr,
):  # fmt: skip
    """Heads from what the decoder gave: the mean added, rotated to the position of the turn's first token.

    x: float16 [groups, n_tokens, GROUP_HEADS * HEAD_DIM]; first_token: the position of the first; out: [n_tokens,
    heads, HEAD_DIM], out_token and out_head apart, in its own dtype. MEAN_ONLY: only the mean is rotated, by each
    token's own position. ONE_TURN: the tokens of a program are of one turn. WIDTH: a power of two of at least
    HEAD_DIM / 2. Grid: (tokens / TOKENS, heads).
    """
    head = tl.program_id(1)
    start = tl.program_id(0) * TOKENS
    token = start.to(tl.int64) + tl.arange(0, TOKENS)
    pair = tl.arange(0, WIDTH)
    here = (token < n_tokens)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    place = x + head // GROUP_HEADS * x_group + token[:, None] * x_token + head % GROUP_HEADS * HEAD_DIM + pair[None, :]
    re = tl.load(place, mask=here, other=0.0).to(tl.float32)
    im = tl.load(place + HEAD_DIM // 2, mask=here, other=0.0).to(tl.float32)
    mean_re, mean_im = tl.zeros([1, WIDTH], tl.float32), tl.zeros([1, WIDTH], tl.float32)
    if HAS_MEAN:
        own = mean + head * HEAD_DIM + pair
        mean_re += tl.load(own, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        mean_im += tl.load(own + HEAD_DIM // 2, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    if not MEAN_ONLY:
        re, im = re + mean_re, im + mean_im
    if ROTATED:
        frequency = tl.load(inv_freq + pair, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        if ONE_TURN:
            angle = ((first_token + start) // turn * turn).to(tl.float32) * frequency
        else:
            angle = ((first_token + token) // turn * turn).to(tl.float32)[:, None] * frequency
        cos, sin = tl.cos(angle) * scale, tl.sin(angle) * scale
        if MEAN_ONLY:
            re, im = re + mean_re * cos - mean_im * sin, im + mean_im * cos + mean_re * sin
        else:
            re, im = re * cos - im * sin, im * cos + re * sin
    to = out + token[:, None] * out_token + head * out_head + pair[None, :]
    tl.store(to, re.to(out.dtype.element_ty), mask=here)
    tl.store(to + HEAD_DIM // 2, im.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n_parts", "head_totals"])
def join_kernel(outputs, totals, out, n_parts, part_numbers, head_totals, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Attention over several parts of the keys, joined by their log-sum-exp.

    outputs: [n_parts, n, heads, DIM], part_numbers apart; totals: float32 [n_parts, heads, n], natural logarithms,
    head_totals from head to head; out: [n, heads, DIM]. WIDTH: a power of two of at least DIM. Grid: (n, heads).
    """
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    place = (query * tl.num_programs(1) + head) * DIM + dim
    total = totals + head * head_totals + query
    high = tl.load(total)  # of the queries' own tokens, and so finite
    for part in range(1, n_parts):
        high = tl.maximum(high, tl.load(total + part * tl.num_programs(1) * head_totals))
    weights = high * 0.0
    acc = tl.zeros([WIDTH], tl.float32)
    for part in range(n_parts):
        weight = tl.exp2((tl.load(total + part * tl.num_programs(1) * head_totals) - high) * 1.4426950408889634)
        weights += weight
        acc += weight * tl.load(outputs + part * part_numbers + place, mask=dim < DIM, other=0.0).to(tl.float32)
    tl.store(out + place, (acc / weights).to(out.dtype.element_ty), mask=dim < DIM)
