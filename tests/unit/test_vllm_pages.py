"""Pages of the engine, without the engine: their layout, what queries see, and a sequence stepped through them."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec
from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.model_spec import PARTS, Part, Site
from kvcompress.plan import Plan, n_encoded
from kvcompress.runtime.attach import attach_plan, attachment_of
from kvcompress.runtime.attention import tiled_attention
from kvcompress.vllm.codecs import heads_of, rank_heads, rank_site
from kvcompress.vllm.pages import PageLayout, blocks_of_page, page_sizes, row_bytes, visible_packed
from kvcompress.vllm.reference import LayerCache, Row, attend, encode_block, encode_chunk, store_exact
from kvcompress.vllm.steps import EncodeClock, Step, encoding_lag


def test_a_page_holds_the_rows_of_keys_then_of_values_from_multiples_of_16_bytes() -> None:
    layout = PageLayout(n_blocks=4, key_row=12, value_row=20)
    assert (layout.value_start, layout.n_bytes) == (48, 128)
    pages = torch.arange(3 * 140, dtype=torch.int32).to(torch.uint8).view(3, 140)
    assert torch.equal(layout.rows(pages, "key")[2, 3], pages[2, 36:48])
    assert torch.equal(layout.rows(pages, "value")[1, 2], pages[1, 88:108])
    layout.rows(pages, "key")[0, 1] = 7  # a view: what is written lands in the page
    assert pages[0, 12:24].eq(7).all()


@pytest.mark.parametrize(
    ("keep", "n_blocks"), [(0.125, 8), (0.12, 8), (0.25, 4), (0.0625, 16), (0.5, 2), (1.0, 1), (0.01, 32)]
)
def test_a_packed_page_takes_about_the_bytes_of_an_exact_one(keep: float, n_blocks: int) -> None:
    plan = SimpleNamespace(keep=keep, sites=[SimpleNamespace(turn=1)])
    assert blocks_of_page(plan) == n_blocks  # type: ignore[arg-type]
    in_turns = SimpleNamespace(keep=keep, sites=[SimpleNamespace(turn=256), SimpleNamespace(turn=1)])
    assert blocks_of_page(in_turns) == (4 if n_blocks == 2 else n_blocks)  # type: ignore[arg-type]


def test_layers_of_different_pages_are_no_repeating_pattern() -> None:
    def layouts(*rows: int) -> dict[int, PageLayout]:
        return {i: PageLayout(1, row, 16) for i, row in enumerate(rows)}

    assert page_sizes(layouts(16, 64, 96)) == {0: 32, 1: 112, 2: 112}  # the closest two are evened out
    assert page_sizes(layouts(16, 16, 96)) == {0: 32, 1: 32, 2: 112}
    assert page_sizes(layouts(16, 16)) == {0: 32, 1: 32}
    two = page_sizes(layouts(16, 16, 96, 96))
    counts = [list(two.values()).count(size) for size in set(two.values())]
    assert len(set(counts)) > 1 or len(counts) == 1


def test_queries_see_packed_what_is_older_than_the_window_or_has_no_exact_page() -> None:
    table = torch.arange(1, 41, dtype=torch.int32).repeat(4, 1)
    table[2, :8] = 0  # a prefix of 256 tokens that was found without its window
    table[2, 0] = 9  # its sinks are there
    table[3, 3:7] = 0  # the middle of a prompt's chunk, long encoded
    computed = torch.tensor([300, 40, 260, 300])
    seen = visible_packed(computed, table, 64)
    assert seen.tolist() == [n_encoded(300, 64), 0, 256, n_encoded(300, 64)]
    assert visible_packed(torch.tensor([0, 64]), table[:2], 0).tolist() == [0, 64]


def step(computed: list[int], n_new: list[int], *, recent: int = 64, most_queries: int = 1) -> Step:
    n = len(computed)
    starts = torch.tensor([0, *torch.tensor(n_new).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([c + m for c, m in zip(computed, n_new, strict=True)], dtype=torch.int32)
    exact = torch.arange(1, 1 + 40 * n, dtype=torch.int32).view(n, 40)
    packed = torch.arange(1001, 1001 + 10 * n, dtype=torch.int32).view(n, 10)
    slots = torch.zeros(sum(n_new), dtype=torch.int64)
    return Step(sum(n_new), starts, lengths, exact, packed, slots, recent, most_queries, 40 * 32)


def test_sequences_longer_than_their_tables_are_no_rows() -> None:
    """vLLM's warm-up with FlashInfer runs such; to look their pages up was a device-side assert."""
    rows = step([0, 100, 0], [1219, 1, 1281]).rows
    assert [(row.start, row.n_new) for row in rows] == [(0, 1219), (1219, 1)]


def test_each_query_token_knows_its_sequence_and_what_it_sees() -> None:
    one = step([300, 5, 0, 130], [1, 3, 0, 1])
    rows, lengths, encoded = one.query_tokens_of(torch.arange(8, dtype=torch.int32))
    assert rows[:5].tolist() == [0, 1, 1, 1, 3]
    assert lengths.tolist() == [301, 6, 7, 8, 131, 0, 0, 0]
    assert encoded.tolist() == [224, 0, 0, 0, 64, 0, 0, 0]
    padded = step([300, 0], [1, 0])  # a recorded step's empty sequences
    assert padded.query_tokens_of(torch.arange(3, dtype=torch.int32))[1].tolist() == [301, 0, 0]


def test_what_generation_completed_is_encoded_before_it_is_seen_packed() -> None:
    one = step([320, 319, 31, 0], [1, 1, 1, 1])
    # complete, and still seen exactly: the blocks of tokens 256 to 319, and of 224 to 287
    assert one.completed().tolist() == [[9, 8, -1, -1], [8, 7, -1, -1]]
    source, destination, first = one.blocks_in_pages(4)
    assert source.tolist() == [10, 49, -1, -1, 9, 48, -1, -1]
    assert destination.tolist() == [4 * 1003 + 1, 4 * 1013, -1, -1, 4 * 1003, 4 * 1012 + 3, -1, -1]
    assert first[[0, 1, 4, 5]].tolist() == [288, 256, 256, 224]
    early = step([64, 65, 66, 95], [1, 1, 1, 1], recent=0, most_queries=2)
    assert early.completed().tolist() == [[1, 1, -1, -1]]


@pytest.mark.parametrize("recent", [0, 32, 64, 100])
def test_no_block_is_seen_packed_before_it_was_encoded(recent: int) -> None:
    rng = random.Random(recent)
    clock, encoded = EncodeClock(recent, 1), [set[int]() for _ in range(6)]
    computed = [0] * 6
    for _ in range(900):
        running = [i for i in range(6) if rng.random() < 0.97]  # sequences pause and come back
        if not running:
            continue
        one = step([computed[i] for i in running], [1] * len(running), recent=recent)
        if clock.due(torch.tensor([computed[i] for i in running])):
            for blocks in one.completed().tolist():
                for i, block in zip(running, blocks, strict=True):
                    encoded[i].add(block)
        for i, seen in zip(running, one.n_packed.tolist(), strict=True):
            assert set(range(seen // 32)) <= encoded[i]
            # what may be offered to other sequences, see PackedManager
            offered = max(0, computed[i] - encoding_lag(recent, 1)) // 32
            assert set(range(offered)) <= encoded[i]
            computed[i] += 1
            if computed[i] == 1100:
                computed[i], encoded[i] = 0, set()


@pytest.mark.parametrize(("n_heads", "n_ranks"), [(8, 1), (8, 2), (8, 8), (2, 4)])
def test_ranks_share_out_the_heads(n_heads: int, n_ranks: int) -> None:
    held = [rank_heads(n_heads, rank, n_ranks) for rank in range(n_ranks)]
    assert {h for first, stop in held for h in range(first, stop)} == set(range(n_heads))
    assert len({stop - first for first, stop in held}) == 1


class Paged:
    """One sequence stepped through pages of the reference, as the engine does it."""

    def __init__(self, codecs: LayerKernels, plan: Plan, n_blocks: int) -> None:
        sites = {s.part: s for s in plan.sites if s.layer == 0}
        layout = PageLayout(n_blocks, row_bytes(sites["key"], 4), row_bytes(sites["value"], 4))
        packed = torch.full((40, 2, layout.n_bytes + 16), 255, dtype=torch.uint8)[:, 1]  # beside another layer
        exact = torch.full((40, codecs.n_kv_heads, 32, 2 * codecs.head_dim), float("nan"))
        self.cache, self.plan, self.length = LayerCache(codecs, layout, packed, exact, plan.sinks), plan, 0
        self.pages, self.exact = torch.randperm(30) + 1, torch.randperm(30) + 1

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value: [n_new, heads, head_dim]."""
        n_new, computed = len(query), self.length
        seen = visible_packed(torch.tensor([computed]), self.exact[None].int(), self.plan.recent)
        row = Row(0, n_new, computed, int(seen), self.pages, self.exact, int(self.exact[0]))
        if n_new == 1 and computed and computed % 32 == 0:
            encode_block(self.cache, row, computed // 32 - 1)
        positions = torch.arange(computed, computed + n_new)
        slots = self.exact[positions // 32] * 32 + positions % 32
        store_exact(self.cache, key, value, slots)
        if n_new > 1:
            encode_chunk(self.cache, row, key, value)
        self.length += n_new
        return attend(self.cache, row, query, key, value, 0.3)


class Contiguous:
    """The same sequence in the run time's own cache."""

    def __init__(self, model: Any) -> None:
        self.tokens = (cache := attachment_of(model).new_cache()).tokens
        self.cache, self.layer = cache, cache.layers[0]

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n_new, n_seen = len(query), self.layer.get_seq_length() + len(query)
        self.cache.begin(torch.arange(n_seen - n_new, n_seen)[None], 1, None)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        keys, values = self.layer.update(key, value)
        mask = torch.ones(n_new, n_seen, dtype=torch.bool).tril(n_seen - n_new)
        if self.layer.n_encoded:
            output = tiled_attention(self.layer, query, mask[None, None], 0.3)[0]
        else:
            attended = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
            output = attended[0].transpose(0, 1)
        self.layer.evict()
        return output


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5, "recent": 64},
        {"keep": 0.5, "recent": 20, "sinks": 40},
        {"keep": 0.5, "recent": 0, "sinks": 0},
        {"keep": 0.5, "turn": 128, "key_basis": "latent"},
        {"keep": 0.5, "key_basis": "frequency"},
        {"keep": 1.0},
    ],
)
def test_a_sequence_stepped_through_pages_is_the_run_time_s(tiny_plan: Any, tiny_model: Any, options: Any) -> None:
    plan, maps = tiny_plan("llama-gqa", **options)
    model = attach_plan(tiny_model("llama-gqa"), plan, maps)
    codecs = attachment_of(model).codecs[0]
    torch.manual_seed(0)
    paged, contiguous = Paged(codecs, plan, n_blocks=4), Contiguous(model)
    for n_new in [37, 100, 1, *[1] * 70, 64, 5, *[1] * 33, 150]:
        query = torch.randn(n_new, 4, codecs.head_dim)
        key, value = torch.randn(2, n_new, codecs.n_kv_heads, codecs.head_dim)
        found, expected = paged.step(query, key, value), contiguous.step(query, key, value)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_maps_are_cut_to_the_heads_of_a_rank(tiny_plan: Any) -> None:
    plan, maps = tiny_plan("llama-mha", keep=0.5, group=2)
    site = Site(1, "value")
    whole = SiteCodec(maps[site], torch.device("cpu"))
    head_dim = plan.sites[0].width // 4
    x = torch.randn(3, plan.sites[0].width)
    parts, bits = [], 0
    for rank in range(2):
        heads = rank_heads(4, rank, 2)
        own = heads_of(maps[site], *heads, head_dim, site=site)
        columns = slice(heads[0] * head_dim, heads[1] * head_dim)
        codec = SiteCodec(own, torch.device("cpu"))
        latents = codec.project(x[:, columns])
        parts.append(codec.decode(latents))
        bits += sum(b * n for b, n in rank_site(plan.sites[0], own, 2 * head_dim).bits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.decode(whole.project(x)), atol=1e-5, rtol=1e-5)
    assert bits == int(maps[site].bits.sum())


@pytest.mark.parametrize("part", PARTS)
def test_ranks_that_sum_their_errors_write_the_codes_of_one_codec_of_all_heads(tiny_plan: Any, part: Part) -> None:
    _, maps = tiny_plan("llama-mha", keep=0.25, group=1)
    site = Site(1, part)
    whole, width = SiteCodec(maps[site], torch.device("cpu")), maps[site].blocks.numel()
    x = torch.randn(1, 4096, width) * torch.logspace(-1, 1, width)  # more than are encoded at once
    cut, alone = ranks_of(maps[site], site, x), ranks_of(maps[site], site, x)
    errors = sum(codec.gain_errors(codec.project(own)) for codec, own in cut)
    for codec, _ in cut:
        codec.sum_over_ranks = lambda _: errors
    expected = whole.encode(x)
    assert expected.gain is not None
    codes = [codec.unpack(codec.pack(own)) for codec, own in cut]
    got = torch.cat([codec.decode(z) for (codec, _), z in zip(cut, codes, strict=True)], 2)
    torch.testing.assert_close(got, whole.decode(whole.unpack(whole.pack(x))), atol=1e-5, rtol=1e-5)
    own_gains = [codec.encode(own).gain for codec, own in alone]  # what each would choose by itself
    assert all((gains != expected.gain).float().mean() > 0.1 for gains in own_gains if gains is not None)


def ranks_of(maps: SiteMaps, site: Site, x: Tensor) -> list[tuple[SiteCodec, Tensor]]:
    """Return each of two ranks' codec, and its part of x, whose mean is subtracted already."""
    head_dim, found = maps.blocks.numel() // 4, []
    for rank in range(2):
        first, stop = rank_heads(4, rank, 2)
        codec = SiteCodec(heads_of(maps, first, stop, head_dim, site=site), torch.device("cpu"))
        found.append((codec, x[..., first * head_dim : stop * head_dim]))
    return found


def test_a_rank_without_codes_sums_errors_with_the_others(tiny_plan: Any) -> None:
    """Else the others would wait for it for ever."""
    _, maps = tiny_plan("llama-mha", keep=0.5, group=1)
    numbers = replace(maps[Site(0, "key")], bits=torch.full_like(maps[Site(0, "key")].bits, 16))
    codec, summed = SiteCodec(numbers, torch.device("cpu")), []
    codec.sum_over_ranks = lambda errors: summed.append(errors) or errors + 1
    x = torch.randn(1, 64, numbers.blocks.numel())
    packed = codec.pack(x)
    assert [list(errors.shape) for errors in summed] == [[1, 64, 16]] and not summed[0].any()
    codec.sum_over_ranks = None
    assert torch.equal(packed, codec.pack(x))


def test_maps_that_mix_heads_of_two_ranks_are_refused(tiny_plan: Any) -> None:
    _, maps = tiny_plan("llama-mha", keep=0.5, group=4)
    with pytest.raises(OptionError, match=r"layers\.0\.key.*--group 2"):
        heads_of(maps[Site(0, "key")], 0, 2, 8, site=Site(0, "key"))
