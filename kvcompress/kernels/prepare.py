"""First launch of a step: the key decoder is absorbed in the query, and the exact tokens are attended to.

The two have nothing to do with each other; they share a launch because each alone is too small to fill a GPU.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _absorb(
    query, decoder, offset, absorbed, bias, q_batch, q_head, q_token, decoder_stride, index, n_chunks,
    n_components, n_batch, n_queries, group_columns, n_columns, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """absorbed = scale D^T q of each head's own rows; bias = what the codes' offsets add to its scores."""
    groups = (n_batch * group_columns + COLUMNS - 1) // COLUMNS
    chunk = index % n_chunks
    kv_head = index // n_chunks // groups
    item = index // n_chunks % groups * COLUMNS + tl.arange(0, COLUMNS)
    row = chunk * WIDTH + tl.arange(0, WIDTH)
    batch = item // group_columns
    own = item % group_columns
    head = kv_head * (group_columns // n_queries) + own // n_queries
    dim = tl.arange(0, DIM)
    wanted = batch < n_batch
    place = batch * q_batch + head * q_head + own % n_queries * q_token
    mask = wanted[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query + place[:, None] + dim[None, :], mask=mask, other=0.0)
    inside = row < n_components
    at = decoder + row[:, None] * decoder_stride + kv_head * HEAD_DIM + dim[None, :]
    d = tl.load(at, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    product = tl.dot(d, tl.trans(q.to(d.dtype))) * scale
    product = tl.minimum(tl.maximum(product, -65504.0), 65504.0).to(tl.float16)
    column = kv_head * group_columns + own
    out = (batch * n_components * n_columns + column)[None, :] + (row * n_columns)[:, None]
    tl.store(absorbed + out, product, mask=inside[:, None] & wanted[None, :])
    shift = tl.load(offset + row, mask=inside, other=0.0)
    total = tl.sum(product.to(tl.float32) * shift[:, None], 0)
    tl.store(bias + (chunk * n_batch + batch) * n_columns + column, total, mask=wanted)


@triton.jit
def _attend(
    q, sink_keys, sink_values, keys, values, mask, n_sinks, n_recent, query_token, n_queries,
    s_token, k_token, v_token, scale,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return sums [ROWS, DIM], largest scores and sums of weights over sinks and recent tokens, causally."""
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    dim = tl.arange(0, DIM)
    inside = (dim < HEAD_DIM)[None, :]
    n_tokens = n_sinks + n_recent
    for start in range(0, n_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        known = token < n_tokens
        is_sink = token < n_sinks
        recent = token - n_sinks
        k_row = tl.where(is_sink, sink_keys + token * s_token, keys + recent * k_token)
        v_row = tl.where(is_sink, sink_values + token * s_token, values + recent * v_token)
        k = tl.load(k_row[:, None] + dim[None, :], mask=known[:, None] & inside, other=0.0)
        v = tl.load(v_row[:, None] + dim[None, :], mask=known[:, None] & inside, other=0.0)
        if HAS_MASK:
            known = known & (tl.load(mask + token, mask=known, other=0) != 0)
        score = tl.dot(q, tl.trans(k)) * scale
        seen = known[None, :] & (recent[None, :] <= (n_recent - n_queries + query_token)[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        p = tl.exp2(score - safe[:, None]).to(v.dtype)
        total = total * shrink + tl.sum(p.to(tl.float32), 1)
        acc = tl.dot(p, v, acc * shrink[:, None])
        top = new
    return acc, top, total


@triton.jit
def _absorb_mean(q_row, mean, out, wanted, column, n_columns, scale, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Store the factors of cos and sin of each frequency in scale q . R(t) mean: [HEAD_DIM, ...] at `out`.

    q_row: pointers [ROWS, 1]; mean: of this KV head, before RoPE, in half-split pairs.
    """
    HALF: tl.constexpr = DIM // 2
    pair = tl.arange(0, HALF)
    inside = pair < HEAD_DIM // 2
    mask = wanted[:, None] & inside[None, :]
    q_re = tl.load(q_row + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    q_im = tl.load(q_row + HEAD_DIM // 2 + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    m_re = tl.load(mean + pair, mask=inside, other=0.0)[None, :]
    m_im = tl.load(mean + HEAD_DIM // 2 + pair, mask=inside, other=0.0)[None, :]
    place = out + pair[None, :] * n_columns + column[:, None]
    tl.store(place, ((q_re * m_re + q_im * m_im) * scale).to(tl.float16), mask=mask)
    tl.store(place + HEAD_DIM // 2 * n_columns, ((q_im * m_re - q_re * m_im) * scale).to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["n_chunks", "n_components", "n_batch", "n_sinks", "n_recent"])
def prepare_kernel(
    query, decoder, offset, absorbed, bias, sink_keys, sink_values, keys, values, exact_mask,
    exact_sums, exact_tops, exact_totals, packed_tops, mean, mean_query,
    q_batch, q_head, q_token, decoder_stride, s_batch, s_head, s_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, n_chunks, n_components, n_batch, n_kv_heads, n_sinks, n_recent, n_queries,
    group_columns, n_columns, scale,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, HAS_MASK: tl.constexpr, MEAN_DIM: tl.constexpr,
):  # fmt: skip
    """Programs: first one for each (sequence, KV head), for the exact tokens; then those of _absorb.

    query: [batch, heads, n_queries, head_dim]; a column is (head, query token). decoder: [R, n]; offset: [R].
    absorbed: [batch, R, n_columns] float16; bias: [chunks, batch, n_columns]. keys, values: [batch, kv heads, tokens,
    head_dim], the last n_queries of the recent ones the queries' own; exact_mask: [batch, n_sinks + n_recent] uint8.
    exact_sums: [batch, n_columns, head_dim], exact_tops, exact_totals: [batch, n_columns]; packed_tops becomes -inf.
    mean: [n_kv_heads * head_dim] of the keys; mean_query: [batch, MEAN_DIM, n_columns], of _absorb_mean;
    MEAN_DIM of 0: no mean.
    """
    index = tl.program_id(0)
    n_exact = n_batch * n_kv_heads
    if index < n_exact:
        batch = (index // n_kv_heads).to(tl.int64)
        kv_head = index % n_kv_heads
        own = tl.arange(0, ROWS)
        wanted = own < group_columns
        head = kv_head * (group_columns // n_queries) + own // n_queries
        token = own % n_queries
        dim = tl.arange(0, DIM)
        inside = (dim < HEAD_DIM)[None, :]
        place = query + batch * q_batch + head[:, None] * q_head + token[:, None] * q_token
        q = tl.load(place + dim[None, :], mask=wanted[:, None] & inside, other=0.0)
        acc, top, total = _attend(
            q, sink_keys + batch * s_batch + kv_head * s_head, sink_values + batch * s_batch + kv_head * s_head,
            keys + batch * k_batch + kv_head * k_head, values + batch * v_batch + kv_head * v_head,
            exact_mask + batch * (n_sinks + n_recent), n_sinks, n_recent, token, n_queries,
            s_token, k_token, v_token, scale, HEAD_DIM, TOKENS, DIM, ROWS, HAS_MASK,
        )  # fmt: skip
        column = batch * n_columns + kv_head * group_columns + own
        tl.store(exact_sums + column[:, None] * HEAD_DIM + dim[None, :], acc, mask=wanted[:, None] & inside)
        tl.store(exact_tops + column, top, mask=wanted)
        tl.store(exact_totals + column, total, mask=wanted)
        if MEAN_DIM:
            _absorb_mean(
                place, mean + kv_head * HEAD_DIM, mean_query + batch * MEAN_DIM * n_columns, wanted,
                kv_head * group_columns + own, n_columns, scale, HEAD_DIM, DIM,
            )  # fmt: skip
        tl.store(packed_tops + column, tl.full([ROWS], float("-inf"), tl.float32), mask=wanted)
    else:
        _absorb(
            query, decoder, offset, absorbed, bias, q_batch, q_head, q_token, decoder_stride, index - n_exact,
            n_chunks, n_components, n_batch, n_queries, group_columns, n_columns, scale,
            HEAD_DIM, DIM, WIDTH, COLUMNS,
        )  # fmt: skip
