"""Encoding from pages into pages, in Triton's interpreter, against what the codec itself gives."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.packing import unpack_codes
from kvcompress.errors import OptionError
from kvcompress.kernels import recorded_encoding
from kvcompress.kernels.page_views import page_words
from kvcompress.kernels.recorded_encoding import EncodedSite, RecordedEncoding
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.model_spec import PARTS, Part
from kvcompress.model.rope import Rotary
from tests.codec_cases import random_codec

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

GROUPS = {16: [4, 0], 8: [4, 8], 4: [12, 4], 2: [4, 8], 1: [8, 4]}


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_blocks_are_encoded_from_pages_into_pages(part: Part, tiled: bool) -> None:
    torch.manual_seed(0)
    heads, head_dim, page_blocks = 4, 32, 2
    codec = random_codec(part, GROUPS, heads, head_dim, tiled=tiled, device=DEVICE)
    both = torch.randn(6, heads, 32, 2 * head_dim).half().to(DEVICE)
    source = both[..., :head_dim].transpose(1, 2)  # as in an engine's pages
    row = codec.pack(torch.zeros(1, 32, heads * head_dim, device=DEVICE)).shape[2]
    pool = torch.full((4, 2, page_blocks * row + 32), 77, dtype=torch.uint8, device=DEVICE)
    words = page_words(pool[:, 1], page_blocks, row // 4, 16)
    # The second block of page 3, both of page 1.
    lists = ([3, -1, 5, 0], [7, -1, 2, 3], [256, 0, 512, 512])
    sources, destinations, turn_positions = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in lists)
    positions = turn_positions.repeat_interleave(32)[None]
    rotary = Rotary(1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim), 1.0) if part == "key" else None
    SiteKernels(codec, heads).pack_pages(source, words, sources, destinations, rotary, positions)

    for i in (0, 2, 3):
        x = source[sources[i]].transpose(0, 1)[None]
        x = x.float() if rotary is None else rotary.unrotate(x, positions[:, 32 * i : 32 * i + 32])
        expected = x.transpose(1, 2).flatten(2) - codec.mean
        own = words[destinations[i] // page_blocks, destinations[i] % page_blocks].view(torch.uint8)[None, None]
        got, gains = codec.unpack(own), own[..., row - 16 :]
        # Float16 latents may fall on the other side of a step, whose two codes are then about as good; and where two
        # gains are, on the other one's.
        assert closeness(codec.decode(got), expected) < closeness(codec.roundtrip(expected), expected) * 1.01
        codes, known = (torch.empty(1, 32, 1, device=DEVICE) for _ in range(2))
        unpack_codes(gains, 4, codes)
        unpack_codes(codec.pack(expected)[..., row - 16 :], 4, known)
        assert (codes == known).float().mean() > 0.9
    untouched = pool.clone()
    page_words(untouched[:, 1], page_blocks, row // 4, 16)[[3, 1, 1], [1, 0, 1]] = 0x4D4D4D4D
    assert (untouched == 77).all()  # nothing else was written


def test_all_sites_encode_the_same_blocks_and_no_others() -> None:
    torch.manual_seed(0)
    heads, head_dim = 2, 32
    sites, alone = [], []
    for part in PARTS * 2:
        codec = random_codec(part, {4: [20, 16]}, heads, head_dim, tiled=True, device=DEVICE)
        source = torch.randn(6, 32, heads, head_dim).half().to(DEVICE)
        row = codec.pack(torch.zeros(1, 32, heads * head_dim, device=DEVICE)).shape[2]
        words = page_words(torch.full((4, 4 * row), 77, dtype=torch.uint8, device=DEVICE), 4, row // 4, 0)
        sites.append(EncodedSite(SiteKernels(codec, heads), source, words, None))
        alone.append(words.clone())
    recorded = RecordedEncoding(sites, n_streams=3)
    for lists in (([3, -1, 0], [9, -1, 2]), ([1, 5, 4], [3, 0, 1]), ([2], [15])):  # the second time, replayed
        sources, destinations = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in lists)
        positions = torch.zeros(1, 32 * len(sources), dtype=torch.int32, device=DEVICE)
        recorded.encode(sources, destinations, positions)
        for site, words in zip(sites, alone, strict=True):
            site.kernels.pack_pages(site.source, words, sources, destinations, None, positions)
            assert torch.equal(site.words, words)
    with pytest.raises(OptionError, match="Expected 1 and 32"):
        recorded.encode(sources, sources[:0], positions)


def test_ranks_choose_gains_together_by_one_sum_for_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_encoding, "_TOGETHER", 2)
    torch.manual_seed(0)
    calls, groups = list[list[int]](), {4: [8, 12], 2: [8, 4]}
    whole = [encoded(random_codec(part, groups, 4, 32, tiled=True, device=DEVICE), 4) for part in PARTS]
    rank = [EncodedSite(SiteKernels(s.kernels.codec, 4), s.source, s.words.clone(), None) for s in whole]
    sources, destinations = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([3, 0, 2], [9, 0, 14]))
    positions = torch.zeros(1, 96, dtype=torch.int32, device=DEVICE)
    RecordedEncoding(whole).encode(sources, destinations, positions)

    def with_the_other_rank(errors: torch.Tensor) -> torch.Tensor:
        calls.append(list(errors.shape))
        return errors * 2  # which holds the same

    for site in rank:
        site.kernels.codec.sum_over_ranks = with_the_other_rank
    together = RecordedEncoding(rank)
    together.encode(sources, destinations, positions)
    assert calls == [[2, 64, 16], [2, 32, 16]]  # two blocks of both sites, then one
    for one, other in zip(whole, rank, strict=True):
        assert torch.equal(one.words, other.words)
    # Another sum, other gains: the last one's. On a GPU this is the recorded way.
    together._sum_over_ranks = lambda errors: -torch.arange(16.0, device=DEVICE).expand_as(errors)
    together.encode(sources[:2], destinations[:2], positions[:, :64])
    for one, other in zip(whole, rank, strict=True):
        rows = other.words.flatten(0, 1)[destinations.long()]
        assert (rows[:2, -4:] == -1).all() and torch.equal(rows[2], one.words.flatten(0, 1)[destinations[2]])


def encoded(codec: SiteCodec, n_pages: int) -> EncodedSite:
    """Return a site with pages of random exact blocks and of rows, four in a page."""
    heads, head_dim = 4, 32
    source = torch.randn(n_pages, 32, heads, head_dim).half().to(DEVICE)
    row = codec.pack(torch.zeros(1, 32, heads * head_dim, device=DEVICE)).shape[2]
    words = page_words(torch.full((n_pages, 4 * row), 77, dtype=torch.uint8, device=DEVICE), 4, row // 4, 0)
    return EncodedSite(SiteKernels(codec, heads), source, words, None)


def test_a_prompt_s_tokens_get_the_gains_that_ranks_choose_together() -> None:
    torch.manual_seed(0)
    codec = random_codec("value", GROUPS, 4, 32, tiled=True, device=DEVICE)
    kernels, x = SiteKernels(codec, 4), torch.randn(2, 32, 128, device=DEVICE)
    latents = x.half() @ kernels.dense.encoder.T
    words = torch.empty(2, 1, codec.pack(x).shape[2] // 4, dtype=torch.int32, device=DEVICE)
    expected = codec.gain_errors(latents.float())
    torch.testing.assert_close(kernels.gain_errors(latents, words), expected, rtol=1e-4, atol=1e-4)
    own = kernels._packed(latents)
    codec.sum_over_ranks = lambda errors: errors * 3
    assert torch.equal(kernels._packed(latents), own)
    codec.sum_over_ranks = lambda errors: -torch.arange(16.0, device=DEVICE).expand_as(errors)
    assert (kernels._packed(latents)[..., -16:] == 255).all() and not (own[..., -16:] == 255).all()


def closeness(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())
