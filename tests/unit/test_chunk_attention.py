"""A chunk's attention over pages, rebuilt in Triton's interpreter, against dense attention over what codecs decode."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.codec.layer import LayerCodecs
from kvcompress.errors import OptionError
from kvcompress.kernels.chunk import Context, RebuiltLayer, RebuiltSite, Tiles, chunk_attention, join
from kvcompress.kernels.page_views import ExactPages, page_words
from kvcompress.kernels.rebuild import Rotation
from kvcompress.kernels.rebuilding import join_kernel
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.rope import Rotary
from tests.codec_cases import random_codec

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

HEADS, KV_HEADS, HEAD_DIM, SINKS, TURN = 4, 2, 32, 3, 64


@pytest.mark.parametrize(
    ("n_tokens", "n_packed", "tile"), [(0, 0, 64), (77, 0, 64), (170, 96, 64), (128, 128, 512), (150, 64, 96)]
)
def test_a_chunk_sees_what_is_cached_and_its_own_tokens(n_tokens: int, n_packed: int, tile: int) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    codecs = [random_codec(part, {4: [20, 16]}, KV_HEADS, HEAD_DIM, tiled=True) for part in ("key", "value")]  # type: ignore[arg-type]
    rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM), 1.0)
    layer = LayerCodecs(*codecs, rotary, KV_HEADS, HEAD_DIM, turn=TURN)
    n_new = 40
    keys, values = (torch.randn(n_tokens + n_new, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    query = torch.randn(n_new, HEADS, HEAD_DIM).to(dtype)
    turn_positions = (torch.arange(n_packed) // TURN * TURN)[None]
    packed = [
        layer.pack_keys(keys[None, :n_packed].transpose(1, 2), turn_positions),
        layer.pack_values(values[None, :n_packed].transpose(1, 2)),
    ]
    seen = [
        torch.cat([x[:SINKS].float(), decoded[0].transpose(0, 1)[SINKS:], x[n_packed:].float()]) if n_packed else x
        for x, decoded in (
            (keys, layer.decode_keys(layer.unpack_keys(packed[0]), turn_positions)),
            (values, layer.decode_values(layer.unpack_values(packed[1]))),
        )
    ]
    context, rebuilt = in_pages(codecs, packed, keys, values, rotary, n_tokens, n_packed)
    own = (x.to(DEVICE) for x in (query, keys[n_tokens:], values[n_tokens:]))
    output = chunk_attention(rebuilt, *own, context=context, tiles=Tiles.of(rebuilt.exact, tile)).cpu().double()

    grown = [x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in seen]
    scores = torch.einsum("qhd,khd->hqk", query.double(), grown[0]) * 0.3
    later = torch.ones(n_new, n_tokens + n_new, dtype=torch.bool).triu(n_tokens + 1)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), grown[1])
    assert (output - expected).norm() / expected.norm() < (8e-3 if DEVICE == "cuda" else 2e-3)


def in_pages(
    codecs: list, packed: list[Tensor], keys: Tensor, values: Tensor, rotary: Rotary, n_tokens: int, n_packed: int,
) -> tuple[Context, RebuiltLayer]:  # fmt: skip
    """Return what is cached of one sequence in pages that lie anywhere, and its layer."""
    page_blocks, sites = 2, []
    pages, exact_pages = torch.randperm(9), torch.randperm(9) + 1
    for codec, own, rotation in zip(codecs, packed, (Rotation(rotary, TURN), None), strict=True):
        row = codec.pack(torch.zeros(1, 32, KV_HEADS * HEAD_DIM)).shape[2]
        pool = torch.full((9, page_blocks * row), 77, dtype=torch.uint8)
        words = page_words(pool, page_blocks, row // 4, 0)
        for block in range(own.shape[1]):
            words[pages[block // 2], block % 2] = own[0, block].view(torch.int32)
        maps = SiteKernels(codec, KV_HEADS).rebuilt
        maps = type(maps)(*(getattr(maps, name).to(DEVICE) for name in ("places", "levels", "decoder")), maps.gain_word)
        sites.append(RebuiltSite(maps, words.to(DEVICE), codec.mean.to(DEVICE), rotation))
    exact = torch.full((11, 32, 2, KV_HEADS, HEAD_DIM), torch.nan, dtype=keys.dtype)
    for token in range(n_tokens):
        if token >= n_packed or token < SINKS:
            exact[exact_pages[token // 32], token % 32] = torch.stack([keys[token], values[token]])
    exact = exact.to(DEVICE)
    parts = ExactPages(exact[:, :, 0], exact[:, :, 1], exact[:, :SINKS, 0], exact[:, :SINKS, 1])
    tables = (x.int().to(DEVICE) for x in (pages, exact_pages))
    return Context(n_tokens, n_packed, *tables, int(exact_pages[0])), RebuiltLayer(*sites, parts, 0.3)


def test_tiles_hold_a_context_of_32k_and_more() -> None:
    x = torch.zeros(1, 32, 8, 128, dtype=torch.bfloat16)
    assert len(Tiles.of(ExactPages(x, x, x, x)).keys) == 36864


def test_tiles_hold_whole_blocks() -> None:
    x = torch.zeros(1, 32, 2, 64).half()
    with pytest.raises(OptionError, match="whole blocks"):
        Tiles.of(ExactPages(x, x, x, x), 100)


@pytest.mark.parametrize("n_parts", [1, 3])
def test_parts_are_joined_as_one_softmax(n_parts: int) -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(n_parts, 5, HEADS, 7) * 3, torch.randn(n_parts, 7, HEADS, HEAD_DIM)
    outputs = torch.einsum("pqhk,pkhd->pqhd", scores.softmax(-1), values)
    expected = torch.einsum(
        "pqhk,pkhd->qhd",
        scores.permute(1, 2, 0, 3).flatten(2).softmax(-1).unflatten(2, (n_parts, 7)).permute(2, 0, 1, 3),
        values,
    )
    totals = scores.logsumexp(-1).transpose(1, 2).contiguous()
    joined = join(outputs.to(DEVICE), totals.to(DEVICE)).cpu()
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-5)


def test_the_kernel_joins_as_torch_does() -> None:
    torch.manual_seed(0)
    outputs, totals = (x.to(DEVICE) for x in (torch.randn(3, 5, HEADS, 48), torch.randn(3, HEADS, 5) * 4))
    out = torch.empty_like(outputs[0])
    join_kernel[(5, HEADS)](outputs, totals, out, 3, outputs.stride(0), totals.stride(1), DIM=48, WIDTH=64)
    expected = (outputs * totals.softmax(0).transpose(1, 2).unsqueeze(3)).sum(0)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
