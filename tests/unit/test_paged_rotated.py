"""Attention over pages of keys encoded after RoPE, in Triton's interpreter, against float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.errors import OptionError
from kvcompress.kernels import paged_layer
from kvcompress.kernels.decode import packed_attention
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.page_views import ExactPages, QueryTokens, page_words
from kvcompress.kernels.paged_rotated import RotatedLayer, rotated_attention
from kvcompress.model.rope import Rotary
from tests.codec_cases import random_codec

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
HEADS, KV_HEADS, HEAD_DIM, SINKS = 4, 2, 64, 3
ROTARY = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM), 1.0)
ROTARY.inv_freq = ROTARY.inv_freq.to(DEVICE)


def codecs(counts: dict[int, list[int]], *, mean: bool) -> LayerKernels:
    key, value = (
        random_codec(part, counts, KV_HEADS, HEAD_DIM, tiled=False, device=DEVICE) for part in ("key", "value")
    )  # type: ignore[arg-type]
    rotated, key.mean = key.mean if mean else None, None
    return LayerKernels(key, value, ROTARY, KV_HEADS, HEAD_DIM, cached_rotated=True, rotated_mean=rotated)


@pytest.mark.parametrize(
    ("counts", "mean", "page_blocks"),
    [({8: [2, 1], 4: [10, 12], 1: [8, 20]}, True, 8), ({16: [12, 9]}, False, 4), ({4: [16, 16]}, True, 16)],
)
def test_attention_is_that_of_float64(
    counts: dict[int, list[int]], mean: bool, page_blocks: int, monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(paged_layer, "kernels_apply", lambda device: True)
    layer, scaling = codecs(counts, mean=mean), 0.2
    rows, lengths, encoded = [1, 0, 2, 0, 3], [350, 75, 0, 76, 20], [288, 32, 0, 32, 0]
    keys, values = (torch.randn(4, KV_HEADS, 352, HEAD_DIM).half().to(DEVICE) for _ in range(2))
    positions = torch.arange(288, device=DEVICE)[None].expand(4, -1)
    packed = layer.pack_keys(keys[:, :, :288], positions), layer.pack_values(values[:, :, :288])
    n_pages = -(-9 // page_blocks)
    table = (torch.randperm(4 * n_pages) + 1).view(4, n_pages).to(DEVICE)
    words = []
    for part in packed:
        # Rows that are not encoded hold what would be NaN.
        pool = torch.full((4 * n_pages + 1, 2, page_blocks * part.shape[2]), 0x7E, dtype=torch.uint8, device=DEVICE)
        own = page_words(pool[:, 1], page_blocks, part.shape[2] // 4, 0)
        for row, n in ((1, 288), (0, 32)):
            for block in range(n // 32):
                own[table[row, block // page_blocks], block % page_blocks] = part[row, block].view(torch.int32)
        words.append(own)
    exact, exact_table = exact_pages(keys, values)
    made = paged_layer.rotated_layer(
        layer,
        *words,
        exact,
        scaling=scaling,
        n_tokens=400,
        most_exact=SINKS + 70,  # type: ignore[misc]
    )
    assert isinstance(made, RotatedLayer)
    lists = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (rows, lengths, encoded))
    tokens = QueryTokens(*lists, table.int(), exact_table.int(), exact_table[:, 0].int())  # type: ignore[misc]
    query = torch.randn(5, HEADS, HEAD_DIM).half().to(DEVICE)
    output = rotated_attention(made, query, tokens, torch.full_like(query, torch.nan)).double()

    decoded = (
        layer.decode_keys(layer.unpack_keys(packed[0]), positions),
        layer.decode_values(layer.unpack_values(packed[1])),
    )
    for i, (row, length, n) in enumerate(zip(rows, lengths, encoded, strict=True)):
        if not length:
            assert not output[i].any()
            continue
        seen = []
        for x, code in zip((keys, values), decoded, strict=True):
            both = (
                torch.cat([x[row, :, :SINKS], code[row, :, SINKS:n], x[row, :, n:length]], 1)
                if n
                else x[row, :, :length]
            )
            seen.append(both.double().repeat_interleave(HEADS // KV_HEADS, 0))
        weights = (torch.einsum("hd,htd->ht", query[i].double(), seen[0]) * scaling).softmax(-1)
        expected = torch.einsum("ht,htd->hd", weights, seen[1])
        assert (output[i] - expected).norm() / expected.norm() < 4e-3


def exact_pages(keys: Tensor, values: Tensor) -> tuple[ExactPages, Tensor]:
    """All tokens in exact pages of 32, those that no sequence has NaN; and their table."""
    n, _, n_tokens, _ = keys.shape
    n_pages = n_tokens // 32
    table = (torch.randperm(n * n_pages) + 1).view(n, n_pages).to(keys.device)
    pages = torch.full((n * n_pages + 1, KV_HEADS, 32, 2 * HEAD_DIM), torch.nan, dtype=keys.dtype, device=keys.device)
    both = torch.cat([keys, values], -1)
    for row in range(n):
        for page in range(n_pages):
            pages[table[row, page]] = both[row, :, 32 * page : 32 * page + 32]
    pages[table[3, 0], :, 20:] = torch.nan  # the sequence of 20 tokens
    k, v = pages[..., :HEAD_DIM].transpose(1, 2), pages[..., HEAD_DIM:].transpose(1, 2)
    return ExactPages(k, v, k[:, :SINKS], v[:, :SINKS]), table


def test_layers_that_the_kernels_do_not_take(monkeypatch: Any) -> None:
    monkeypatch.setattr(paged_layer, "kernels_apply", lambda device: True)
    x = torch.zeros(3, 32, KV_HEADS, HEAD_DIM).half()
    exact = ExactPages(x, x, x[:, :SINKS], x[:, :SINKS])
    words = torch.zeros(3, 8, 400, dtype=torch.int32)
    options = {"scaling": 0.1, "n_tokens": 100, "most_exact": 80}
    fit = codecs({4: [16, 16]}, mean=True)
    assert paged_layer.rotated_layer(fit, words, words, exact, **options) is not None  # type: ignore[arg-type]
    assert paged_layer.rotated_layer(fit, words[:, :2], words[:, :2], exact, **options) is None  # type: ignore[arg-type]
    unfit = LayerKernels(fit.key, fit.value, ROTARY, KV_HEADS, HEAD_DIM)
    assert paged_layer.rotated_layer(unfit, words, words, exact, **options) is None  # type: ignore[arg-type]


def test_short_pages_are_refused() -> None:
    layer = codecs({4: [16, 16]}, mean=False)
    assert layer.key_site is not None and layer.value_site is not None
    words = torch.zeros(3, 2, 132, dtype=torch.int32)
    sites = layer.key_site.site(words), layer.value_site.site(words)
    with pytest.raises(OptionError, match="pages of 2 blocks"):
        packed_attention(
            torch.zeros(1, HEADS, 1, HEAD_DIM), *sites, first=words, last=words, n_blocks=4, exact=None,  # type: ignore[arg-type]
            scaling=0.1, pages=object(),  # type: ignore[arg-type]
        )  # fmt: skip
