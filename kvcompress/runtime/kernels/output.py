"""After the weighted sums: splits are added up, decoded, and joined with the exact tokens."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvcompress.runtime.kernels.values import largest


@triton.jit(do_not_specialize=["n_components", "n_splits", "n_tiles"])
def reduce_kernel(
    sums, offset, tops, totals, latents, top_out, total_out, n_components, n_splits, n_tiles, n_columns,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """latents = the packed tokens' weighted mean of z; grid: (chunks of components, column groups, batch).

    sums: [batch, splits, R, n_columns]; tops, totals: [batch, n_tiles, n_columns], of score_kernel. latents:
    [batch, n_columns, R] float16; top_out, total_out: [batch, n_columns], the largest score and the sum of weights.
    """
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < n_components)[:, None]
    tops += batch * n_tiles * n_columns
    totals += batch * n_tiles * n_columns
    top = largest(tops, n_tiles, n_columns, column, COLUMNS)
    weight = tl.zeros([32, COLUMNS], tl.float32)
    for start in range(0, n_tiles, 32):
        tile = start + tl.arange(0, 32)
        place = tile[:, None] * n_columns + column[None, :]
        known = (tile < n_tiles)[:, None]
        height = tl.load(tops + place, mask=known, other=float("-inf"))
        weight += tl.load(totals + place, mask=known, other=0.0) * tl.exp2(height - top[None, :])
    total = tl.sum(weight, 0)
    acc = tl.zeros([WIDTH, COLUMNS], tl.float32)
    place = sums + batch * n_splits * n_components * n_columns + row[:, None] * n_columns + column[None, :]
    for _ in range(0, n_splits):
        acc += tl.load(place, mask=inside, other=0.0)
        place += n_components * n_columns
    shift = tl.load(offset + row, mask=row < n_components, other=0.0)
    mean = acc / tl.where(total > 0, total, 1.0)[None, :] - shift[:, None]
    out = latents + (batch * n_columns + column)[None, :] * n_components + row[:, None]
    tl.store(out, mean.to(tl.float16), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(top_out + batch * n_columns + column, top)
        tl.store(total_out + batch * n_columns + column, total)


@triton.jit
def _exact(
    acc, top, total, q, keys, values, mask, n_tokens, newest, query_token, key_stride, value_stride, scale,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Add exact tokens to an online softmax; token t is seen by query token i if t <= newest + i."""
    dim = tl.arange(0, DIM)
    inside = (dim < HEAD_DIM)[None, :]
    for start in range(0, n_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        known = token < n_tokens
        k = tl.load(keys + token[:, None] * key_stride + dim[None, :], mask=known[:, None] & inside, other=0.0)
        v = tl.load(values + token[:, None] * value_stride + dim[None, :], mask=known[:, None] & inside, other=0.0)
        if HAS_MASK:
            known = known & (tl.load(mask + token, mask=known, other=0) != 0)
        score = tl.dot(q, tl.trans(k)) * scale
        seen = known[None, :] & (token[None, :] <= (newest + query_token)[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(score - safe[:, None]).to(v.dtype)
        total = total * shrink + tl.sum(p.to(tl.float32), 1)
        acc = tl.dot(p, v, acc * shrink[:, None])
        top = new
    return acc, top, total


@triton.jit(do_not_specialize=["n_components", "n_sinks", "n_recent"])
def output_kernel(
    query, latents, decoder, mean, tops, totals, sink_keys, sink_values, keys, values, exact_mask, out,
    q_batch, q_head, q_token, s_batch, s_head, s_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    o_batch, o_token, o_head, decoder_stride, n_components, n_sinks, n_recent, n_queries, group_columns, n_columns,
    scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Attention output of one KV head's query heads; grid: (KV heads, batch).

    sink_keys, sink_values: [batch, kv heads, n_sinks, head_dim], of one set of strides; keys, values: the recent
    tokens, the last n_queries of them the queries' own; exact_mask: [batch, n_sinks + n_recent] uint8.
    """
    kv_head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, ROWS)
    wanted = own < group_columns
    head = kv_head * (group_columns // n_queries) + own // n_queries
    token = own % n_queries
    dim = tl.arange(0, DIM)
    inside = (dim < HEAD_DIM)[None, :]
    column = batch * n_columns + kv_head * group_columns + own

    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, n_components, WIDTH):
        component = start + tl.arange(0, WIDTH)
        real = component < n_components
        z = tl.load(
            latents + column[:, None] * n_components + component[None, :], mask=wanted[:, None] & real[None, :], other=0.0
        )
        d = tl.load(
            decoder + component[:, None] * decoder_stride + kv_head * HEAD_DIM + dim[None, :],
            mask=real[:, None] & inside,
            other=0.0,
        )
        acc = tl.dot(z.to(d.dtype), d, acc)
    if HAS_MEAN:
        acc += tl.load(mean + kv_head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]
    total = tl.load(totals + column, mask=wanted, other=0.0)
    top = tl.where(total > 0, tl.load(tops + column, mask=wanted, other=0.0), float("-inf"))
    acc = acc * total[:, None]

    place = query + batch * q_batch + head[:, None] * q_head + token[:, None] * q_token + dim[None, :]
    q = tl.load(place, mask=wanted[:, None] & inside, other=0.0)
    mask_row = exact_mask + batch * (n_sinks + n_recent)
    acc, top, total = _exact(
        acc, top, total, q, sink_keys + batch * s_batch + kv_head * s_head, sink_values + batch * s_batch + kv_head * s_head,
        mask_row, n_sinks, n_sinks, token, s_token, s_token, scale, HEAD_DIM, 16, DIM, HAS_MASK,
    )  # fmt: skip
    acc, top, total = _exact(
        acc, top, total, q, keys + batch * k_batch + kv_head * k_head, values + batch * v_batch + kv_head * v_head,
        mask_row + n_sinks, n_recent, n_recent - n_queries, token, k_token, v_token, scale, HEAD_DIM, TOKENS, DIM, HAS_MASK,
    )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    place = out + batch * o_batch + token[:, None] * o_token + head[:, None] * o_head + dim[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=wanted[:, None] & inside)
