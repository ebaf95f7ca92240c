"""Packed pages rebuilt in Triton's interpreter, against the codec's own unpacking and decoding."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.codec.layer import LayerCodecs
from kvcompress.kernels.page_views import page_words
from kvcompress.kernels.rebuild import Rotation, rebuild
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.model_spec import PARTS, Part
from kvcompress.model.rope import Rotary
from tests.codec_cases import random_codec

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

GROUPS = {16: [4, 0], 8: [4, 8], 4: [12, 60], 2: [4, 8], 1: [8, 4]}
HEADS, HEAD_DIM, PAGE_BLOCKS = 4, 48, 2


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("groups", [GROUPS, {16: [12, 8]}])
def test_pages_are_rebuilt_as_the_codec_does_it(part: Part, tiled: bool, groups: dict[int, list[int]]) -> None:
    torch.manual_seed(0)
    codec = random_codec(part, groups, HEADS, HEAD_DIM, tiled=tiled, device=DEVICE)
    packed = codec.pack(torch.randn(1, 5 * 32, HEADS * HEAD_DIM).to(DEVICE) * 0.7)
    pool = torch.full((6, 3, PAGE_BLOCKS * packed.shape[2]), 77, dtype=torch.uint8, device=DEVICE)
    words = page_words(pool[:, 1], PAGE_BLOCKS, packed.shape[2] // 4, 0)
    pages = torch.tensor([4, 1, 5], device=DEVICE)
    for block in range(5):
        words[pages[block // 2], block % 2] = packed[0, block].view(torch.int32)

    rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM), 1.25) if part == "key" else None
    layer = LayerCodecs(codec, codec, rotary, HEADS, HEAD_DIM, turn=64)
    positions = (torch.arange(160, device=DEVICE) // 64 * 64)[None]
    expected = layer.decode_keys(codec.unpack(packed), positions)[0].transpose(0, 1)[32:]
    out = torch.full((128, HEADS, 2, HEAD_DIM), torch.nan, device=DEVICE)[:, :, 1]
    rotation = None if rotary is None else Rotation(rotary, turn=64)
    rebuild(
        SiteKernels(codec, HEADS).rebuilt, words, pages.int(), out, first_block=1, mean=codec.mean, rotation=rotation
    )
    assert (out - expected).norm() / expected.norm() < 1e-3  # latents and what the decoder gives are float16 numbers


def test_of_keys_encoded_after_rope_the_mean_alone_is_rotated() -> None:
    torch.manual_seed(0)
    codec = random_codec("key", {4: [20, 16]}, HEADS, HEAD_DIM, tiled=False, device=DEVICE)
    mean, codec.mean = codec.mean, None
    packed = codec.pack(torch.randn(1, 64, HEADS * HEAD_DIM).to(DEVICE))
    rotary = Rotary(1e4 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM), 1.0)
    layer = LayerCodecs(codec, codec, rotary, HEADS, HEAD_DIM, cached_rotated=True, rotated_mean=mean)
    expected = layer.decode_keys(codec.unpack(packed), torch.arange(64, device=DEVICE)[None])[0].transpose(0, 1)
    pages, out = torch.tensor([0], dtype=torch.int32, device=DEVICE), torch.empty(64, HEADS, HEAD_DIM, device=DEVICE)
    rotation = Rotation(rotary, mean_only=True)
    maps = SiteKernels(codec, HEADS).rebuilt
    rebuild(maps, packed.view(torch.int32), pages, out, first_block=0, mean=mean, rotation=rotation)
    assert (out - expected).norm() / expected.norm() < 1e-3
