"""Triton kernels that turn packed rows back into keys and values: codes to latents, and what follows the decoder."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_block", "n_columns", "gain_word"])
def latents_kernel(
    words, pages, places, levels, out, first_block, n_columns, gain_word, page_words, row_words,
    PAGE_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Latents of blocks of packed tokens, of a sequence's block first_block on: out float16 [n_blocks * 32, n_columns].

    words: [pages, PAGE_BLOCKS, row_words], page_words apart; pages: int32, those of the sequence; places: int32
    [n_columns, 32], 32 * word + bit of each token's code; levels: float32 [n_columns, 3], the largest code of a column
    (65535: a float16 number), what a code is multiplied by, and what is then taken off. Grid: (blocks, columns /
    WIDTH).
    """
    block = first_block + tl.program_id(0)
    page = tl.load(pages + block // PAGE_BLOCKS).to(tl.int64)
    words += page * page_words + block % PAGE_BLOCKS * row_words
    token = tl.arange(0, 32)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = (column < n_columns)[None, :] & (token >= 0)[:, None]
    place = tl.load(places + column[None, :] * 32 + token[:, None], mask=real, other=0)
    most = tl.load(levels + column * 3, mask=column < n_columns, other=0.0).to(tl.int32)
    size = tl.load(levels + column * 3 + 1, mask=column < n_columns, other=0.0)
    offset = tl.load(levels + column * 3 + 2, mask=column < n_columns, other=0.0)
    code = (tl.load(words + place // 32, mask=real, other=0) >> (place % 32)) & most[None, :]
    number = (code & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    z = tl.where(most[None, :] == 65535, number, code.to(tl.float32) * size[None, :] - offset[None, :])
    if HAS_GAIN:
        gain = (tl.load(words + gain_word + token // 8) >> (token % 8 * 4)) & 15
        z = z * tl.exp2((gain.to(tl.float32) - 4.0) * 0.25)[:, None]
    to = out + (tl.program_id(0).to(tl.int64) * 32 + token[:, None]) * n_columns + column[None, :]
    tl.store(to, tl.minimum(tl.maximum(z, -65504.0), 65504.0).to(tl.float16), mask=real)


@triton.jit(do_not_specialize=["first_token", "turn"])
def heads_kernel(
    x, mean, inv_freq, out, first_token, turn, out_token, out_head, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROTATED: tl.constexpr, MEAN_ONLY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Heads from what the decoder gave: the mean added, rotated to the position of the turn's first token.

    x: float16 [n_tokens, heads * HEAD_DIM]; first_token: the position of the first; out: [n_tokens, heads, HEAD_DIM],
    out_token and out_head apart, in its own dtype. MEAN_ONLY: only the mean is rotated, by each token's own position.
    WIDTH: a power of two of at least HEAD_DIM / 2. Grid: (tokens / TOKENS, heads); TOKENS divides their number.
    """
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, WIDTH)
    here = (token >= 0)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    place = x + token[:, None] * (tl.num_programs(1) * HEAD_DIM) + head * HEAD_DIM + pair[None, :]
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
        position = (first_token + token) // turn * turn
        frequency = tl.load(inv_freq + pair, mask=pair < HEAD_DIM // 2, other=0.0)
        angle = position.to(tl.float32)[:, None] * frequency[None, :]
        cos, sin = tl.cos(angle) * scale, tl.sin(angle) * scale
        if MEAN_ONLY:
            re, im = re + mean_re * cos - mean_im * sin, im + mean_im * cos + mean_re * sin
        else:
            re, im = re * cos - im * sin, im * cos + re * sin
    to = out + token[:, None] * out_token + head * out_head + pair[None, :]
    tl.store(to, re.to(out.dtype.element_ty), mask=here)
    tl.store(to + HEAD_DIM // 2, im.to(out.dtype.element_ty), mask=here)
