"""Quantising and packing latents on the GPU: each token's best gain, then its codes as words of 32-token blocks."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens"])
def centre_kernel(
    x, positions, inv_freq, mean, out, x_batch, x_head, x_token, position_batch, n_tokens, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROTATED: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Un-rotate heads and take off the mean: out float16 [batch, n_tokens, heads * HEAD_DIM], within its range.

    x: [batch, heads, n_tokens, HEAD_DIM]; positions: [1 or batch, n_tokens]; inv_freq: [HEAD_DIM / 2]; scale: what
    RoPE multiplied by; mean: [heads * HEAD_DIM]. WIDTH: a power of two of at least HEAD_DIM / 2. Grid: (tokens /
    TOKENS, heads, batch).
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, WIDTH)
    here = (token < n_tokens)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    place = x + batch * x_batch + head * x_head + token[:, None] * x_token + pair[None, :]
    re = tl.load(place, mask=here, other=0.0).to(tl.float32)
    im = tl.load(place + HEAD_DIM // 2, mask=here, other=0.0).to(tl.float32)
    if ROTATED:
        position = tl.load(positions + batch * position_batch + token, mask=token < n_tokens, other=0).to(tl.float32)
        angle = position[:, None] * tl.load(inv_freq + pair, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        re, im = (re * cos + im * sin) / scale, (im * cos - re * sin) / scale
    if HAS_MEAN:
        own = mean + head * HEAD_DIM + pair
        re -= tl.load(own, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
        im -= tl.load(own + HEAD_DIM // 2, mask=pair < HEAD_DIM // 2, other=0.0)[None, :]
    to = out + (batch * n_tokens + token[:, None]) * (tl.num_programs(1) * HEAD_DIM) + head * HEAD_DIM + pair[None, :]
    tl.store(to, tl.minimum(tl.maximum(re, -65504.0), 65504.0).to(tl.float16), mask=here)
    tl.store(to + HEAD_DIM // 2, tl.minimum(tl.maximum(im, -65504.0), 65504.0).to(tl.float16), mask=here)


@triton.jit
def _rounded(x, half):
    """Return the codes of x, in units of the step; half = 2^(bits - 1)."""
    return tl.minimum(tl.maximum(tl.floor(x) + half, 0.0), 2 * half - 1)


@triton.jit(do_not_specialize=["first_component", "n_components"])
def gain_kernel(
    latents, halves, gains, token_stride, first_component, n_components, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):
    """gains: uint8 [n_tokens], the code 0..15 of 2^((code - 4) / 4) with which a token is rebuilt best.

    latents: [n_tokens, R] in units of the steps; halves: [R], 2^(bits - 1). Components before first_component are not
    quantised. Grid: n_tokens / TOKENS.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    code = tl.arange(0, 16)
    gain = tl.exp2((code.to(tl.float32) - 4.0) * 0.25)
    error = tl.zeros([TOKENS, 16, WIDTH], tl.float32)
    for start in range(first_component, n_components, WIDTH):
        component = start + tl.arange(0, WIDTH)
        real = component < n_components
        place = latents + token[:, None] * token_stride + component[None, :]
        x = tl.load(place, mask=real[None, :], other=0.0).to(tl.float32)[:, None, :]
        half = tl.load(halves + component, mask=real, other=1.0)[None, None, :]
        rebuilt = (_rounded(x / gain[None, :, None], half) - half + 0.5) * gain[None, :, None]
        wrong = tl.where(real[None, None, :], rebuilt - x, 0.0)
        error += wrong * wrong
    tl.store(gains + token, tl.argmin(tl.sum(error, 2), 1, tie_break_left=True).to(tl.uint8))


@triton.jit
def _pack_class(
    latents, gains, words, token_stride, row, first_word, start, count, BITS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Pack WIDTH components of one class, 32 tokens of each: BITS words of 32 / BITS codes."""
    token = tl.arange(0, 32)
    component = start + tl.arange(0, WIDTH)
    real = component < count
    place = latents + token[:, None] * token_stride + (row + component)[None, :]
    x = tl.load(place, mask=real[None, :], other=0.0).to(tl.float32)
    if BITS == 16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        code = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    else:
        if HAS_GAIN:
            x = x / tl.exp2((tl.load(gains + token).to(tl.float32) - 4.0) * 0.25)[:, None]
        code = _rounded(x, 2.0 ** (BITS - 1)).to(tl.int32)
    PER: tl.constexpr = 32 // BITS
    shift = tl.arange(0, PER) * BITS
    word = tl.sum(code.reshape(BITS, PER, WIDTH) << shift[None, :, None], 1)
    out = words + first_word + (component * BITS)[None, :] + tl.arange(0, BITS)[:, None]
    tl.store(out, word, mask=real[None, :])


@triton.jit(do_not_specialize=["n16", "n8", "n4", "n2", "n1", "n_blocks", "gain_word"])
def pack_kernel(
    latents, gains, words, batch_tokens, token_stride, batch_words, row_words, gain_word, n_blocks,
    n16, n8, n4, n2, n1, CLASSES: tl.constexpr, WIDTH: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """One program: WIDTH components of one class of one block. Grid: (blocks, chunks of components, batch).

    latents: [batch, n_tokens, R]; gains: uint8 [batch, n_tokens]; words: [batch, >= n_blocks, row_words] int32.
    """
    block = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    latents += batch * batch_tokens + block * 32 * token_stride
    gains += (batch * n_blocks + block) * 32
    words += batch * batch_words + block * row_words
    if HAS_GAIN and chunk == 0:
        code = tl.load(gains + tl.arange(0, 32)).to(tl.int32).reshape(4, 8)
        tl.store(words + gain_word + tl.arange(0, 4), tl.sum(code << (tl.arange(0, 8) * 4)[None, :], 1))
    word = 0
    row = 0
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
            start = chunk * WIDTH
            if (start >= 0) & (start < count):
                _pack_class(latents, gains, words, token_stride, row, word, start, count, 16 >> index, WIDTH, HAS_GAIN)
            chunk -= (count + WIDTH - 1) // WIDTH
            word += count * (16 >> index)
            row += count
