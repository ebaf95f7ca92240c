"""Codecs and pages as the kernels take them: attention in the emulator over rows that the codecs packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.kernels import paged_layer as layers
from kvcompress.kernels import turned
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.page_views import ExactPages, QueryTokens, page_words
from kvcompress.kernels.paged import paged_attention, workspace_for
from kvcompress.kernels.paged_layer import paged_layer, rebuilt_layer
from kvcompress.model.rope import Rotary
from tests import emulator
from tests.codec_cases import random_codec

HEADS, KV_HEADS, HEAD_DIM, TURN = 4, 2, 64, 128
GROUPS = {8: [8, 4], 4: [20, 16]}


def codecs(*, tiled: bool = True, turn: int = TURN, **changes: Any) -> LayerKernels:
    torch.manual_seed(0)
    key, value = (random_codec(part, GROUPS, KV_HEADS, HEAD_DIM, tiled=tiled) for part in ("key", "value"))  # type: ignore[arg-type]
    rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM), 1.0)
    return LayerKernels(key, value, rotary, KV_HEADS, HEAD_DIM, turn=turn, **changes)


def exact_pages() -> ExactPages:
    x = torch.randn(9, 32, 2, KV_HEADS, HEAD_DIM).half()
    return ExactPages(x[:, :, 0], x[:, :, 1], x[:, :4, 0], x[:, :4, 1])


def words_of(packed: torch.Tensor) -> torch.Tensor:
    """Pages of four blocks, one after the other."""
    n_blocks, row = packed.shape[1:]
    return page_words(packed[0].reshape(n_blocks // 4, 4 * row), 4, row // 4, 0)


@pytest.mark.skipif(not emulator.available(), reason="needs g++ 12, for the emulator")
def test_attention_over_what_codecs_packed(monkeypatch: Any) -> None:
    monkeypatch.setattr(layers, "compiler_works", lambda device: True)
    monkeypatch.setattr(turned, "_kernels", emulator.kernels)
    layer, exact = codecs(), exact_pages()
    keys, values = (torch.randn(1, KV_HEADS, 256, HEAD_DIM) for _ in range(2))
    turns = (torch.arange(256) // TURN * TURN)[None]
    packed = layer.pack_keys(keys, turns), layer.pack_values(values)
    options = {"n_heads": HEADS, "scaling": 0.1, "n_tokens": 300, "most_exact": 80}
    paged = paged_layer(layer, words_of(packed[0]), words_of(packed[1]), exact, **options)
    assert paged is not None
    query, int32 = torch.randn(1, HEADS, HEAD_DIM).half(), torch.int32
    tables = ([[0, 1]], [[3, 0, 0, 0, 0, 0, 0, 0, 7, 2]], [3])  # the sinks lie in exact page 3
    tokens = QueryTokens(*(torch.tensor(x, dtype=int32) for x in ([0], [300], [256], *tables)))
    workspace = workspace_for([paged], 1)
    workspace.schedule(tokens.encoded)
    output = paged_attention(paged, query, tokens, workspace, torch.empty_like(query))[0].double()

    seen = []
    for decoded, pages in (
        (layer.decode_keys(layer.unpack_keys(packed[0]), turns), exact.keys),
        (layer.decode_values(layer.unpack_values(packed[1])), exact.values),
    ):
        recent = pages[[7, 2]].flatten(0, 1)[:44]
        all_of = torch.cat([pages[3, :4].float(), decoded[0].transpose(0, 1)[4:], recent.float()])
        seen.append(all_of.double().repeat_interleave(HEADS // KV_HEADS, 1))
    weights = (torch.einsum("hd,khd->hk", query[0].double(), seen[0]) * 0.1).softmax(-1)
    expected = torch.einsum("hk,khd->hd", weights, seen[1])
    assert (output - expected).norm() / expected.norm() < 1e-3


def test_layers_that_the_kernels_do_not_take(monkeypatch: Any) -> None:
    monkeypatch.setattr(layers, "compiler_works", lambda device: True)
    monkeypatch.setattr(layers, "kernels_apply", lambda device: True)
    options = {"n_heads": HEADS, "scaling": 0.1, "n_tokens": 300, "most_exact": 80}
    words = torch.zeros(2, 4, 400, dtype=torch.int32)
    assert paged_layer(codecs(), words, words, exact_pages(), **options) is not None
    for unfit in (codecs(tiled=False), codecs(turn=1), codecs(turn=64)):
        assert paged_layer(unfit, words, words, exact_pages(), **options) is None
    assert paged_layer(codecs(), words[:, :1], words[:, :1], exact_pages(), **options) is None

    rebuilt = rebuilt_layer(codecs(tiled=False, turn=1), words, words, exact_pages(), 0.1)
    assert rebuilt is not None and rebuilt.keys.rotation is not None and rebuilt.keys.rotation.turn == 1
    mean = torch.randn(KV_HEADS * HEAD_DIM)
    rotated = rebuilt_layer(codecs(cached_rotated=True, rotated_mean=mean), words, words, exact_pages(), 0.1)
    assert rotated is not None and rotated.keys.mean is mean
    assert rotated.keys.rotation is not None and rotated.keys.rotation.mean_only
    half = LayerKernels(None, codecs().value, None, KV_HEADS, HEAD_DIM)
    assert rebuilt_layer(half, words, words, exact_pages(), 0.1) is None
