"""Before the scores: the key decoder is absorbed in the query, once for each step."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_components", "n_batch"])
def absorb_kernel(
    query, decoder, offset, absorbed, bias, batch_stride, head_stride, token_stride, decoder_stride,
    n_components, n_batch, n_queries, group_columns, n_columns, head_dim, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """absorbed = scale D^T q of each head's own rows; bias = what the codes' offsets add to its scores.

    Grid: (chunks of WIDTH components, KV heads, groups of COLUMNS of all sequences' columns of that KV head).
    query: [batch, heads, n_queries, head_dim]; decoder: [R, n]; offset: [R]. A column is (head, query token).
    absorbed: [batch, R, n_columns] float16; bias: [chunks, batch, n_columns].
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = chunk * WIDTH + tl.arange(0, WIDTH)
    item = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    batch = item // group_columns
    own = item % group_columns
    heads = group_columns // n_queries
    dim = tl.arange(0, DIM)
    wanted = batch < n_batch
    place = (
        batch.to(tl.int64) * batch_stride
        + (kv_head * heads + own // n_queries) * head_stride
        + own % n_queries * token_stride
    )
    q = tl.load(query + place[None, :] + dim[:, None], mask=wanted[None, :] & (dim < head_dim)[:, None], other=0.0)
    inside = row < n_components
    d = tl.load(
        decoder + row[:, None] * decoder_stride + kv_head * head_dim + dim[None, :],
        mask=inside[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )
    product = tl.dot(d, q.to(d.dtype)) * scale
    product = tl.minimum(tl.maximum(product, -65504.0), 65504.0).to(tl.float16)
    column = kv_head * group_columns + own
    out = (batch.to(tl.int64) * n_components)[None, :] * n_columns + row[:, None] * n_columns + column[None, :]
    tl.store(absorbed + out, product, mask=inside[:, None] & wanted[None, :])
    shift = tl.load(offset + row, mask=inside, other=0.0)
    tl.store(
        bias + (chunk * n_batch + batch) * n_columns + column,
        tl.sum(product.to(tl.float32) * shift[:, None], 0),
        mask=wanted,
    )
