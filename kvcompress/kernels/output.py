"""Last launch of a step: splits are added up, decoded, and joined with the exact tokens."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _to_rows(x, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """[GROUP] -> [ROWS] or [GROUP, n] -> [ROWS, n], repeated: a matrix product has at least 16 rows."""
    if len(x.shape) == 1:
        result = tl.broadcast_to(x[None, :], (ROWS // GROUP, GROUP)).reshape(ROWS)
    else:
        width: tl.constexpr = x.shape[1]
        result = tl.broadcast_to(x[None, :, :], (ROWS // GROUP, GROUP, width)).reshape(ROWS, width)
    return result


@triton.jit(do_not_specialize=["n_components", "n_splits", "n_tiles"])
def output_kernel(
    sums, offset, packed_tops, tops, totals, weighted_totals, exact_sums, exact_tops, exact_totals, decoder, mean, out,
    o_batch, o_token, o_head, decoder_stride, n_components, sum_stride, n_splits, n_tiles, n_queries, group_columns,
    n_columns,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, TILES: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Output of one KV head's query heads, DIM channels of it; grid: (KV heads, batch, channels / DIM).

    sums: [batch, splits, n_columns, sum_stride], of value_kernel; tops, totals, weighted_totals:
    [batch, n_tiles, n_columns], of score_kernel; packed_tops: [batch, n_columns]; exact_*: of
    prepare_kernel; decoder: [R, n]; out: [batch, n_queries, heads, head_dim].
    """
    kv_head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    own = tl.arange(0, GROUP)
    column = kv_head * group_columns + own
    wanted = own < group_columns
    dim = tl.program_id(2) * DIM + tl.arange(0, DIM)
    inside = (dim < HEAD_DIM)[None, :]

    top = tl.load(packed_tops + batch * n_columns + column, mask=wanted, other=float("-inf"))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.zeros([TILES, GROUP], tl.float32)
    weighted = tl.zeros([TILES, GROUP], tl.float32)
    for start in range(0, n_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        place = (batch * n_tiles + tile)[:, None] * n_columns + column[None, :]
        known = (tile < n_tiles)[:, None] & wanted[None, :]
        height = tl.load(tops + place, mask=known, other=float("-inf"))
        share = tl.exp2(height - safe[None, :])
        weight += tl.load(totals + place, mask=known, other=0.0) * share
        weighted += tl.load(weighted_totals + place, mask=known, other=0.0) * share
    total = tl.sum(weight, 0)
    scale = 1.0 / tl.where(total > 0, total, 1.0)
    gained = tl.sum(weighted, 0) * scale

    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, n_components, WIDTH):
        component = start + tl.arange(0, WIDTH)
        real = component < n_components
        z = tl.zeros([GROUP, WIDTH], tl.float32)
        at = column[:, None] * sum_stride + component[None, :]
        for first in range(0, n_splits, SPLITS):
            for more in tl.static_range(SPLITS):
                split = tl.full([GROUP], first + more, tl.int32)
                known = (wanted & (split < n_splits))[:, None] & real[None, :]
                row = (batch * n_splits + split) * n_columns * sum_stride
                z += tl.load(sums + row[:, None] + at, mask=known, other=0.0)
        shift = tl.load(offset + component, mask=real, other=0.0)
        latent = z * scale[:, None] - gained[:, None] * shift[None, :]
        place = decoder + component[:, None] * decoder_stride + kv_head * HEAD_DIM + dim[None, :]
        d = tl.load(place, mask=real[:, None] & inside, other=0.0)
        acc = tl.dot(_to_rows(latent, GROUP, ROWS).to(d.dtype), d, acc)
    if HAS_MEAN:
        acc += tl.load(mean + kv_head * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]

    row = tl.arange(0, ROWS)
    real_row = row < group_columns
    column = batch * n_columns + kv_head * group_columns + row
    beside = tl.load(exact_sums + column[:, None] * HEAD_DIM + dim[None, :], mask=real_row[:, None] & inside, other=0.0)
    exact_top = tl.load(exact_tops + column, mask=real_row, other=float("-inf"))
    exact_total = tl.load(exact_totals + column, mask=real_row, other=0.0)
    top_row, total_row = _to_rows(top, GROUP, ROWS), _to_rows(total, GROUP, ROWS)
    highest = tl.maximum(top_row, exact_top)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    packed_share = total_row * tl.exp2(top_row - highest)
    exact_share = tl.exp2(exact_top - highest)
    whole = packed_share + exact_total * exact_share
    result = acc * packed_share[:, None] + beside * exact_share[:, None]
    result = result / tl.where(whole > 0, whole, 1.0)[:, None]
    head = kv_head * (group_columns // n_queries) + row // n_queries
    place = out + batch * o_batch + (row % n_queries)[:, None] * o_token + head[:, None] * o_head + dim[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=real_row[:, None] & inside)
