"""What the queries of a step of generation see, and the schedule of their splits, in one Triton launch."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _packed(starts, lengths, exact_table, table_row, n_pages, row, known, recent, AHEAD: tl.constexpr):
    """Return how many tokens of sequences the queries of a step see packed; see paged_step.begin_step."""
    begin = tl.load(starts + row, mask=known, other=0)
    stop = tl.load(starts + row + 1, mask=known, other=0)
    computed = tl.maximum(tl.load(lengths + row, mask=known, other=0) - (stop - begin), 0)
    first = tl.maximum(computed - recent, 0) // 32
    seen = first
    for ahead in tl.static_range(AHEAD):
        block = first + ahead
        place = exact_table + row.to(tl.int64) * table_row + tl.minimum(block, n_pages - 1)
        page = tl.load(place, mask=known, other=1)
        seen = tl.where((page == 0) & (block * 32 < computed), block + 1, seen)
    return seen * 32


@triton.jit(do_not_specialize=["n_rows", "n_tokens", "n_pages", "recent", "most_whole", "most_last", "at_once"])
def step_kernel(
    starts, lengths, exact_table, token_rows, token_lengths, token_encoded, row_packed, row_sinks, splits, split_starts,
    table_row, n_pages, n_rows, n_tokens, recent, at_once, most_whole, most_last, splits_part, starts_part,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, UNIT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of at_once query tokens, chunks). A program works out the part's tokens, and writes a chunk of its
    splits, most_whole in all, or most_last in the last part. The first writes the tokens, too, and program i of the
    first part ROWS of the sequences, row_packed and row_sinks.

    TOKENS: a power of two of at least at_once; AHEAD: blocks from the first exact one on that may lack their page.
    """
    part, chunk = tl.program_id(0), tl.program_id(1)
    own = tl.arange(0, TOKENS)
    first = part * at_once
    n = tl.minimum(at_once, n_tokens - first)
    most = tl.where(part == tl.num_programs(0) - 1, most_last, most_whole)
    token = first + own
    row = tl.zeros([TOKENS], tl.int32)
    for start in range(0, n_rows, ROWS):
        other = start + tl.arange(0, ROWS)
        stop = tl.load(starts + other + 1, mask=other < n_rows, other=2147483647)
        row += tl.sum((stop[None, :] <= token[:, None]).to(tl.int32), 1)
    row = tl.minimum(row, n_rows - 1)
    here = own < n
    behind = tl.load(starts + row + 1, mask=here, other=0) - 1 - token
    length = tl.load(lengths + row, mask=here, other=0) - behind
    real = here & (token < tl.load(starts + n_rows)) & (behind >= 0) & (length > 0)
    encoded = _packed(starts, lengths, exact_table, table_row, n_pages, row, here, recent, AHEAD)
    encoded = tl.where(real, encoded, 0)
    if chunk == 0:
        tl.store(token_rows + token, row, mask=here)
        tl.store(token_lengths + token, tl.where(real, length, 0), mask=here)
        tl.store(token_encoded + token, encoded, mask=here)

    # The schedule: see paged_workspace.share_out.
    units = (encoded + (UNIT - 1)) // UNIT
    rest = most - n
    longest = tl.maximum((tl.sum(units, 0) + rest - 1) // rest, 1)
    stops = tl.cumsum((units + longest - 1) // longest, 0)
    if chunk == 0:
        split_starts += part * starts_part
        tl.store(split_starts + own * 0, tl.zeros([TOKENS], tl.int32), mask=own == 0)
        tl.store(split_starts + 1 + own, stops, mask=here)
    split = chunk * SPLITS + tl.arange(0, SPLITS)
    # Entries after the n-th are not before any split.
    all_stops = tl.where(here, stops, 2147483647)[None, :]
    before = all_stops <= split[:, None]
    of = tl.sum(before.to(tl.int32), 1)
    begin = tl.max(tl.where(before, all_stops, 0), 1)
    stop = tl.min(tl.where(before, 2147483647, all_stops), 1)
    place = splits + part * splits_part + 3 * split
    there = of < n
    tl.store(place, tl.where(there, of, -1), mask=split < most)
    tl.store(place + 1, tl.where(there, split - begin, 0), mask=split < most)
    tl.store(place + 2, tl.where(there, stop - begin, 0), mask=split < most)

    if part == 0:
        for start in range(chunk * ROWS, n_rows, ROWS * tl.num_programs(1)):
            other = start + tl.arange(0, ROWS)
            known = other < n_rows
            packed = _packed(starts, lengths, exact_table, table_row, n_pages, other, known, recent, AHEAD)
            tl.store(row_packed + other, packed, mask=known)
            sinks = tl.load(exact_table + other.to(tl.int64) * table_row, mask=known, other=0)
            tl.store(row_sinks + other, sinks, mask=known)
