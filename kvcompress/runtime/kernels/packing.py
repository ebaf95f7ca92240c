"""Quantising and packing latents on the GPU: each token's best gain, then its codes as words of 32-token blocks."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


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
