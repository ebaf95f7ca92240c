"""Attention over pages against float64: on a GPU, and in the emulator where there is a C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels import turned
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.page_views import ExactPages, QueryTokens, page_words
from kvcompress.kernels.paged import PagedLayer, applies, paged_attention, turn_angles, workspace_for
from kvcompress.kernels.paged_workspace import Widths, Workspace, share_out
from kvcompress.kernels.turned import COMBINE_MEMORY, GroupedSite
from kvcompress.model.rope import Rotary
from tests import emulator
from tests.turned_cases import random_site

SITE = {8: [4, 8], 4: [40, 16], 2: [32, 36], 1: [4, 16]}  # components of each group
CASES: dict[str, dict[str, Any]] = {
    "unequal lengths, one of them padding": {
        "counts": SITE, "gain": True, "lengths": [470, 300, 0, 100], "encoded": [384, 256, 0, 32],
    },
    "pages shorter than turns, bfloat16": {
        "counts": SITE, "gain": True, "page_blocks": 4, "turn": 256, "lengths": [470, 97], "encoded": [384, 0],
        "dtype": torch.bfloat16,
    },
    "turns shorter than pages": {"counts": SITE, "page_blocks": 8, "turn": 128, "lengths": [460], "encoded": [352]},
    "several queries of a sequence, in parts": {
        "counts": {4: [32, 20]}, "gain": True, "rows": [1, 1, 1, 0], "lengths": [398, 399, 400, 210],
        "encoded": [320, 320, 320, 128], "at_once": 3,
    },
    "numbers, in rows that may never have been written": {
        "counts": {16: [20, 36], 4: [4, 0]}, "kv_heads": 2, "head_dim": 128, "lengths": [300, 200],
        "encoded": [224, 96],
    },
    "ranks only": {"counts": {16: [64, 64]}, "kv_heads": 2, "lengths": [300], "encoded": [224]},
    "nothing exact but the query itself": {"counts": SITE, "gain": True, "lengths": [257, 1], "encoded": [256, 0]},
    "three KV heads in two passes": {
        "counts": {8: [8], 4: [36], 2: [20], 1: [12]}, "heads": 9, "kv_heads": 3, "gain": True,
        "lengths": [470, 300, 0, 100], "encoded": [384, 256, 0, 32], "at_once": 3,
    },
    "a pass for each of two KV heads": {
        "counts": {8: [4, 8], 4: [24, 36]}, "heads": 28, "kv_heads": 4, "gain": True, "lengths": [470],
        "encoded": [384],
    },
    "the 8B shape": {
        "counts": {8: [8] * 4, 4: [72] * 4, 2: [56] * 4, 1: [40] * 4}, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "gain": True, "dtype": torch.bfloat16, "turn": 256, "lengths": [1000, 333], "encoded": [928, 256],
    },
}  # fmt: skip


@pytest.fixture(params=["cpu", "cuda"])
def device(request: Any, monkeypatch: Any) -> Iterator[str]:
    """Where the kernels run."""
    if request.param == "cpu":
        if not emulator.available():
            pytest.skip("needs g++ 12, for the emulator")
        monkeypatch.setattr(turned, "_kernels", emulator.kernels)
    elif not torch.cuda.is_available() or not compiler_works(torch.device("cuda", 0)):
        pytest.skip("needs an NVIDIA GPU")
    yield str(request.param)


@dataclass
class Case:
    layer: PagedLayer
    query: Tensor
    tokens: QueryTokens
    expected: Tensor


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    re, im = x.chunk(2, -1)
    return torch.cat([re * angle.cos() - im * angle.sin(), im * angle.cos() + re * angle.sin()], -1)


def in_pages(
    site: GroupedSite, pool: Tensor, table: Tensor, encoded: Tensor, n_blocks: int, offset: int
) -> GroupedSite:
    """Write the rows of sequences that are encoded into the pages of a table, and NaN into those that are not."""
    words = page_words(pool, n_blocks, site.words.shape[2], offset)
    words.fill_(0x7E017E01)
    for row in range(len(table)):
        for block in range(int(encoded[row]) // 32):
            words[table[row, block // n_blocks], block % n_blocks] = site.words[row, block]
    return replace(site, words=words)


def random_case(
    device: str, *, counts: dict[int, list[int]], lengths: list[int], encoded: list[int], rows: list[int] | None = None,
    heads: int = 8, kv_heads: int = 4, head_dim: int = 64, page_blocks: int = 8, turn: int = 256, gain: bool = False,
    dtype: torch.dtype = torch.float16, n_sinks: int = 4, at_once: int | None = None, most_exact: int = 110,
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    rows = rows or list(range(len(lengths)))
    n_rows, longest = max(rows) + 1, max(lengths)
    n_blocks = -(-max(encoded) // 32) or 1
    keys, key_z, key_decoder = random_site("key", n_rows, n_blocks, counts, kv_heads, head_dim, gain)
    values, value_z, value_decoder = random_site("value", n_rows, n_blocks, counts, kv_heads, head_dim, gain)
    assert keys.mean is not None and values.mean is not None
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    of_row = torch.zeros(n_rows, dtype=torch.long)
    of_row[rows] = torch.tensor(encoded)

    n_pages, n_exact_pages = -(-n_blocks // page_blocks), -(-longest // 32)
    order = torch.randperm(n_rows * n_pages) + 1  # page 0 belongs to nobody
    table = order.view(n_rows, n_pages)
    sizes = [4 * page_blocks * site.words.shape[2] for site in (keys, values)]
    pool = torch.zeros(n_rows * n_pages + 1, 2, sum(sizes) + 16, dtype=torch.uint8)[:, 1]  # beside another layer
    keys = in_pages(keys, pool, table, of_row, page_blocks, 0)
    values = in_pages(values, pool, table, of_row, page_blocks, sizes[0])
    exact_table = (torch.randperm(n_rows * n_exact_pages) + 1).view(n_rows, n_exact_pages)
    exact = torch.randn(n_rows * n_exact_pages + 1, kv_heads, 32, 2 * head_dim).to(dtype)
    exact[0] = torch.nan
    exact_keys, exact_values = exact[..., :head_dim].transpose(1, 2), exact[..., head_dim:].transpose(1, 2)

    def decoded(z: Tensor, decoder: Tensor, site: GroupedSite) -> Tensor:
        return (z @ decoder.double() + site.mean).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    position = torch.arange(n_blocks * 32)
    angle = (position // turn * turn)[:, None].double() * inv_freq.double()
    key = rotated(decoded(key_z, key_decoder, keys), angle)
    value = decoded(value_z, value_decoder, values)
    query = torch.randn(len(rows), heads, head_dim).to(dtype)
    expected = torch.zeros(len(rows), heads, head_dim, dtype=torch.double)
    for i, (row, length, n) in enumerate(zip(rows, lengths, encoded, strict=True)):

        def all_of(packed: Tensor, pages: Tensor, row: int = row, length: int = length, n: int = n) -> Tensor:
            own = pages[exact_table[row]].flatten(0, 1).double()[:length].transpose(0, 1)
            both = torch.cat([own[:, :n_sinks], packed[row, :, n_sinks:n], own[:, n:]], 1) if n else own
            return both.repeat_interleave(heads // kv_heads, 0)

        if length:
            scores = torch.einsum("hd,htd->ht", query[i].double(), all_of(key, exact_keys)) * head_dim**-0.5
            expected[i] = torch.einsum("ht,htd->hd", scores.softmax(-1), all_of(value, exact_values))
    # Exact pages of tokens that are packed and no sinks are freed.
    hidden = exact_table.clone()
    for row in range(n_rows):
        hidden[row, 1 : of_row[row] // 32] = 0
    tokens = [torch.tensor(x, dtype=torch.int32) for x in (rows, lengths, encoded)]
    tokens += [table.int(), hidden.int(), exact_table[:, 0].int()]

    def moved(site: GroupedSite, pool: Tensor) -> GroupedSite:
        words = torch.as_strided(
            pool.view(torch.int32), site.words.shape, site.words.stride(), site.words.storage_offset()
        )
        layout = replace(site.layout, table=site.layout.table.to(device))
        moved = {name: getattr(site, name).to(device) for name in ("maps", "mean", "largest_rows")}
        return replace(site, words=words, layout=layout, **moved)

    whole = torch.as_strided(pool, (pool.untyped_storage().nbytes(),), (1,), 0).to(device)
    exact = exact.to(device)
    pages = ExactPages(
        exact[..., :head_dim].transpose(1, 2), exact[..., head_dim:].transpose(1, 2),
        exact[..., :head_dim].transpose(1, 2)[:, :n_sinks], exact[..., head_dim:].transpose(1, 2)[:, :n_sinks],
    )  # fmt: skip
    angles = turn_angles(Rotary(inv_freq, 1.0), turn, longest, torch.device(device))
    layer = PagedLayer(moved(keys, whole), moved(values, whole), pages, heads, turn, angles, head_dim**-0.5, most_exact)
    return Case(layer, query.to(device), QueryTokens(*(x.to(device) for x in tokens)), expected.to(device))


def attend(case: Case, **options: Any) -> Tensor:
    workspace = workspace_for([case.layer], len(case.query), **options)
    workspace.schedule(case.tokens.encoded)
    out = torch.full_like(case.query, torch.nan)
    return paged_attention(case.layer, case.query, case.tokens, workspace, out).double()


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(name: str, device: str) -> None:
    sizes = dict(CASES[name])
    at_once = sizes.pop("at_once", None)
    case = random_case(device, **sizes)
    options = {} if at_once is None else {"most_bytes": at_once * query_bytes(case)}
    output = attend(case, **options)
    error = (output - case.expected).norm() / case.expected.norm()
    assert error < (3e-3 if case.query.dtype == torch.bfloat16 else 1e-3)  # the output is rounded to it


def query_bytes(case: Case) -> int:
    """What a query token takes of the absorbed ones."""
    return case.layer.angles.shape[1] * case.layer.n_passes * sum(case.layer.keys.layout.sets) * 512


def test_long_sequences_are_split_more() -> None:
    encoded, splits, starts = (
        torch.tensor(x, dtype=torch.int32) for x in ([12800, 0, 128, 1280], [[7] * 3] * 16, [7] * 5)
    )
    share_out(encoded, splits, starts)
    assert starts.tolist() == [0, 10, 10, 11, 12]
    assert splits[:10].tolist() == [[0, i, 10] for i in range(10)]
    assert splits[10:].tolist() == [[2, 0, 1], [3, 0, 1]] + [[-1, s, n] for s, n in splits[12:, 1:].tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_splits_are_even_and_suffice(seed: int) -> None:
    torch.manual_seed(seed)
    n, most = 9, 40
    encoded = torch.randint(0, 5000, (n,), dtype=torch.int32) // 32 * 32
    splits, starts = torch.empty(most, 3, dtype=torch.int32), torch.empty(n + 1, dtype=torch.int32)
    share_out(encoded, splits, starts)
    own = starts.diff()
    units = -(-encoded // 128)
    assert starts[-1] <= most and ((own > 0) == (encoded > 0)).all()
    assert (units / own.clamp_min(1)).max() <= -(-units.sum() // (most - n))


def test_no_more_query_tokens_at_once_than_combine_has_room_for() -> None:
    wide = Widths(2, 2, 8, 128, 20, 20, 7)  # eight query heads of a KV head
    workspace = Workspace.of([wide], 2000, 1, 1 << 30, torch.device("cpu"))
    splits = [len(part.splits) for part in workspace.parts(2000)]
    assert len(splits) > 1 and wide.combine_bytes(max(splits)) <= COMBINE_MEMORY
    more = Workspace.of([replace(wide, group_columns=2)], 2000, 1, 1 << 30, torch.device("cpu"))
    assert more.at_once > workspace.at_once


def test_applies_where_units_of_tokens_lie_in_one_page_and_turn() -> None:
    layout = random_site("key", 1, 1, {4: [32] * 4}, 8, 128, True)[0].layout
    cpu = torch.device("cpu")
    assert applies(32, 8, 128, layout, layout, turn=256, page_blocks=4, device=cpu)
    assert not applies(32, 8, 128, layout, layout, turn=64, page_blocks=4, device=cpu)
    assert not applies(32, 8, 128, layout, layout, turn=256, page_blocks=1, device=cpu)


def test_pages_that_are_not_aligned_are_refused() -> None:
    with pytest.raises(OptionError, match="multiples of 16 bytes"):
        page_words(torch.zeros(3, 1000, dtype=torch.uint8), 4, 8, 0)
    with pytest.raises(OptionError, match="multiples of 16 bytes"):
        page_words(torch.zeros(3, 1024, dtype=torch.uint8), 4, 8, 8)
    words = page_words(torch.zeros(3, 1024, dtype=torch.uint8), 4, 7, 16)
    site = replace(random_site("key", 1, 1, {4: [32] * 4}, 8, 128, True)[0], words=words)
    y = torch.zeros(3, 32, 2, 64).half()
    with pytest.raises(OptionError, match="tile layout"):
        PagedLayer(site, site, ExactPages(y, y, y, y), 8, 128, y, 1.0, 9)
    x = torch.zeros(3, 32, 2, 68, dtype=torch.half)[..., :64]
    with pytest.raises(OptionError, match="exact keys"):
        ExactPages(x, x, x, x)
