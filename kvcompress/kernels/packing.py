"""Quantising and packing latents on the GPU: each token's best gain, then its codes as words of 32-token blocks."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens"])
def centre_kernel(
    x, sources, positions, inv_freq, mean, out, x_batch, x_head, x_token, position_batch, n_tokens, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROTATED: tl.constexpr, HAS_MEAN: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Un-rotate heads and take off the mean: out float16 [batch, n_tokens, heads * HEAD_DIM], within its range.

    x: [batch, heads, n_tokens, HEAD_DIM]; positions: [1 or batch, n_tokens]; inv_freq: [HEAD_DIM / 2]; scale: what
    RoPE multiplied by; mean: [heads * HEAD_DIM]. WIDTH: a power of two of at least HEAD_DIM / 2. Grid: (tokens /
    TOKENS, heads, batch). PAGED: x is [pages, heads, 32, HEAD_DIM], and block i of 32 tokens lies in page sources[i],
    or is zeros if that is -1; batch is 1.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, WIDTH)
    here = (token < n_tokens)[:, None] & (pair < HEAD_DIM // 2)[None, :]
    if PAGED:
        source = tl.load(sources + tl.program_id(0) * TOKENS // 32).to(tl.int64)
        there = here & (0 * pair + source >= 0)[None, :]
        place = x + source * x_batch + head * x_head + (token % 32)[:, None] * x_token + pair[None, :]
    else:
        there = here
        place = x + batch * x_batch + head * x_head + token[:, None] * x_token + pair[None, :]
    re = tl.load(place, mask=there, other=0.0).to(tl.float32)
    im = tl.load(place + HEAD_DIM // 2, mask=there, other=0.0).to(tl.float32)
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


@triton.jit
def _gain_errors(
    latents, halves, token, token_stride, first_component, n_components, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):
    """Return tokens' squared errors under the gains 2^((code - 4) / 4), code 0..15: [TOKENS, 16]."""
    code = tl.arange(0, 16)
    gain = tl.exp2((code.to(tl.float32) - 4.0) * 0.25)
    inverse = tl.exp2((4.0 - code.to(tl.float32)) * 0.25)[None, :, None]
    # In units of the gain, which is taken out of the sum: a few instructions for each of 16 gains and all components.
    error = tl.zeros([TOKENS, 16, WIDTH], tl.float32)
    for start in range(first_component, n_components, WIDTH):
        component = start + tl.arange(0, WIDTH)
        real = component < n_components
        place = latents + token[:, None] * token_stride + component[None, :]
        x = tl.load(place, mask=real[None, :], other=0.0).to(tl.float32)[:, None, :]
        half = tl.load(halves + component, mask=real, other=1.0)[None, None, :]
        y = x * inverse
        wrong = tl.minimum(tl.maximum(tl.floor(y), -half), half - 1) - y + 0.5
        wrong = tl.where(real[None, None, :], wrong, 0.0)
        error += wrong * wrong
    return tl.sum(error, 2) * (gain * gain)[None, :]


@triton.jit(do_not_specialize=["first_component", "n_components"])
def gain_kernel(
    latents, halves, gains, token_stride, first_component, n_components, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):
    """gains: uint8 [n_tokens], the code 0..15 of 2^((code - 4) / 4) with which a token is rebuilt best.

    latents: [n_tokens, R] in units of the steps; halves: [R], 2^(bits - 1). Components before first_component are not
    quantised. Grid: n_tokens / TOKENS.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = _gain_errors(latents, halves, token, token_stride, first_component, n_components, WIDTH, TOKENS)
    tl.store(gains + token, tl.argmin(total, 1, tie_break_left=True).to(tl.uint8))


@triton.jit(do_not_specialize=["first_component", "n_components"])
def error_kernel(
    latents, halves, errors, token_stride, first_component, n_components, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):
    """errors: float32 [n_tokens, 16], by which `gain_kernel` chooses; the other arguments are its own."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = _gain_errors(latents, halves, token, token_stride, first_component, n_components, WIDTH, TOKENS)
    tl.store(errors + token[:, None] * 16 + tl.arange(0, 16)[None, :], total)


@triton.jit
def _codes(
    latents, gains, token_stride, row, start, count, BITS: tl.constexpr, WIDTH: tl.constexpr, HAS_GAIN: tl.constexpr
):
    """Return the codes of 32 tokens of WIDTH components of one class, of 16 bits the float16 numbers': [32, WIDTH]."""
    token = tl.arange(0, 32)
    component = start + tl.arange(0, WIDTH)
    place = latents + token[:, None] * token_stride + (row + component)[None, :]
    x = tl.load(place, mask=(component < count)[None, :], other=0.0).to(tl.float32)
    if HAS_GAIN:
        x = x / tl.exp2((tl.load(gains + token).to(tl.float32) - 4.0) * 0.25)[:, None]
    if BITS == 16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        code = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    else:
        code = _rounded(x, 2.0 ** (BITS - 1)).to(tl.int32)
    return code


@triton.jit
def _store_plain(code, words, first_word, start, count, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Store codes [32, WIDTH] as BITS words of each component, of 32 / BITS codes."""
    component = start + tl.arange(0, WIDTH)
    PER: tl.constexpr = 32 // BITS
    shift = tl.arange(0, PER) * BITS
    word = tl.sum(code.reshape(BITS, PER, WIDTH) << shift[None, :, None], 1)
    out = words + first_word + (component * BITS)[None, :] + tl.arange(0, BITS)[:, None]
    tl.store(out, word, mask=(component < count)[None, :])


@triton.jit
def _store_tiles(code, words, quads, first_quad, n_quads, BITS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Store codes [32, WIDTH] of BITS (16, 4, 2 or 1) as the words of quads, of which the first n_quads are real.

    quads: from first_quad on, first word and index of each; see tiles.quad_places. Token 16 t + 8 h + 2 a + b.
    """
    token, component = tl.arange(0, 32)[:, None], tl.arange(0, WIDTH)[None, :] % 4
    t, h, b = token // 16, token // 8 % 2, token % 2
    if BITS == 16:
        shift = 16 * (component % 2) if KEYS else 16 * b
    elif BITS == 4:
        shift = 8 * component + 4 * h if KEYS else 16 * h + 8 * b + 4 * (component % 2)
    elif BITS == 2:
        shift = 8 * component + 4 * h + 2 * t if KEYS else 16 * h + 8 * b + 2 * component
    else:
        shift = 8 * component + 4 * h + 2 * b + t if KEYS else 16 * h + 8 * b + 4 * t + component
    # What shares a word is summed: neighbouring components, and tokens that differ in t, h or b.
    JOINED: tl.constexpr = (2 if BITS == 16 else 4) if KEYS else (1 if BITS == 16 else 2 if BITS == 4 else 4)
    T: tl.constexpr = 1 if BITS == 1 or (KEYS and BITS == 2) else 2
    H: tl.constexpr = 2 if BITS == 16 else 1
    B: tl.constexpr = 2 if KEYS and BITS > 1 else 1
    N: tl.constexpr = WIDTH // JOINED
    word = code << shift
    if JOINED > 1:
        word = tl.sum(word.reshape(32, N, JOINED), 2)
    word = word.reshape(2, 2, 4, 2, N)
    if B == 1:
        word = tl.sum(word, 3, keep_dims=True)
    if H == 1:
        word = tl.sum(word, 1, keep_dims=True)
    if T == 1:
        word = tl.sum(word, 0, keep_dims=True)
    t, h = tl.arange(0, T)[:, None, None, None, None], tl.arange(0, H)[None, :, None, None, None]
    a, b = tl.arange(0, 4)[None, None, :, None, None], tl.arange(0, B)[None, None, None, :, None]
    part = tl.arange(0, N)[None, None, None, None, :] * JOINED
    quad, component = part // 4, part % 4
    real = quad < n_quads
    start = tl.load(quads + 2 * (first_quad + quad), mask=real, other=0)
    index = tl.load(quads + 2 * (first_quad + quad) + 1, mask=real, other=0)
    j, r = component // 2, 2 * a + b
    if BITS == 16:
        if KEYS:
            inside = 32 * j + ((r + 4 * index + 2 * j) & 7) * 4 + 2 * t + h
        else:
            inside = 16 * ((2 * j + t) ^ (index & 1)) + 4 * a + component % 2 + 2 * h
    elif BITS == 4:
        inside = 2 * (r ^ ((index & 2) << 1)) + t if KEYS else 4 * a + 2 * t + j
    elif BITS == 2:
        inside = r if KEYS else 2 * a + t
    else:
        inside = a
    tl.store(words + start + inside, word, mask=real)


# Strides differ from prompt to prompt in what divides them, and nothing here reads or writes more than a word at once.
_UNSPECIALISED = ["batch_tokens", "token_stride", "batch_words", "row_words", "gain_word", "n_blocks"]


@triton.jit(do_not_specialize=[*_UNSPECIALISED, "n16", "n8", "n4", "n2", "n1"])
def pack_kernel(
    latents, gains, words, quads, destinations, batch_tokens, token_stride, batch_words, row_words, gain_word, n_blocks,
    n16, n8, n4, n2, n1, CLASSES: tl.constexpr, WIDTH: tl.constexpr, HAS_GAIN: tl.constexpr, TILES: tl.constexpr,
    PAGE_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: WIDTH components of one class of one block. Grid: (blocks, chunks of components, batch).

    latents: [batch, n_tokens, R]; gains: uint8 [batch, n_tokens]; words: [batch, >= n_blocks, row_words] int32.
    TILES: "key" or "value", whose tile layout the rows have, with Tiles.quads; "" for the plain layout. PAGE_BLOCKS: 0,
    or words are [pages, PAGE_BLOCKS, row_words], and block i is written to row destinations[i] of all, nowhere if that
    is -1.
    """
    block = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(1)
    latents += batch * batch_tokens + block * 32 * token_stride
    gains += (batch * n_blocks + block) * 32
    if PAGE_BLOCKS:
        destination = tl.load(destinations + block).to(tl.int64)
        if destination < 0:
            return
        words += destination // PAGE_BLOCKS * batch_words + destination % PAGE_BLOCKS * row_words
    else:
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
                code = _codes(latents, gains, token_stride, row, start, count, 16 >> index, WIDTH, HAS_GAIN)
                if TILES == "":
                    _store_plain(code, words, word, start, count, 16 >> index, WIDTH)
                else:
                    own, n_quads = (row + start) // 4, (count - start) // 4
                    if index == 1:
                        low = (n16 + n8 + n4 + n2 + n1 + start) // 4
                        _store_tiles(code >> 4, words, quads, own, n_quads, 4, WIDTH, TILES == "key")
                        _store_tiles(code & 15, words, quads, low, n_quads, 4, WIDTH, TILES == "key")
                    else:
                        _store_tiles(code, words, quads, own, n_quads, 16 >> index, WIDTH, TILES == "key")
            chunk -= (count + WIDTH - 1) // WIDTH
            word += count * (16 >> index)
            row += count
