"""The kernels against float64 and against packing written from the format, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.codec.tiles import Tiles
from kvcompress.errors import OptionError
from kvcompress.kernels.decode import packed_attention
from kvcompress.kernels.encode import centred, pack_latents
from kvcompress.kernels.layout import PackedSite, row_words
from kvcompress.model.model_spec import PARTS, Part
from kvcompress.model.rope import Rotary
from tests.packed_cases import Case, moved, pack_codes, random_case

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

MIXED = {8: 3, 4: 40, 2: 67, 1: 21}
CASES: dict[str, dict[str, Any]] = {
    "all classes": {"key_counts": MIXED, "value_counts": MIXED},
    "gains, key mean": {"key_counts": MIXED, "value_counts": MIXED, "gain": True, "key_mean": True, "first": [4, 50]},
    "ranks only": {"key_counts": {16: 35}, "value_counts": {16: 35}, "head_dim": 128},
    "masks, two queries": {
        "key_counts": {4: 30, 1: 40},
        "value_counts": {2: 50},
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 96,
        "n_queries": 2,
        "masked": True,
    },
    "unequal lengths, odd rows": {
        "key_counts": {8: 30},
        "value_counts": {8: 30},
        "heads": 8,
        "kv_heads": 2,
        "first": [100, 0],
        "last": [690, 257],
        "pad_words": 1,
    },
    "nothing to see": {
        "key_counts": {4: 30},
        "value_counts": {1: 50},
        "heads": 3,
        "kv_heads": 1,
        "first": [0, 700],
        "n_recent": 1,
    },
    "one token": {"key_counts": MIXED, "value_counts": MIXED, "n_tokens": 1, "n_recent": 1, "n_sinks": 0},
    "wide heads": {"key_counts": {4: 20}, "value_counts": {4: 20}, "n_tokens": 40, "head_dim": 256},
}


def attend(case: Case, **changes: Any) -> torch.Tensor:
    case = moved(case, DEVICE)
    output = packed_attention(
        case.query, case.keys, case.values, first=case.first, last=case.last, n_blocks=case.n_blocks,
        exact=case.exact, scaling=case.scaling, mask=case.mask, angles=case.angles, **changes,
    )  # fmt: skip
    return output.cpu().double()


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(name: str) -> None:
    case = random_case(**CASES[name])
    error = (attend(case) - case.expected).norm() / case.expected.norm()
    assert error < 1.5e-3  # float16 weights and queries


def test_splits_do_not_change_the_result() -> None:
    case = random_case(key_counts=MIXED, value_counts=MIXED, gain=True, n_tokens=900)
    outputs = [attend(case, n_splits=n) for n in (1, 2, 4)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-3)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    case = random_case(key_counts={4: 8}, value_counts={4: 8}, n_tokens=64, first=[64, 0], n_recent=2, n_sinks=1)
    blind = torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.uint8)
    case.exact = replace(case.exact, mask=blind)
    output = attend(case)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.isfinite(output).all() and output[1].abs().sum() > 0


def test_a_mean_of_keys_needs_positions() -> None:
    case = random_case(key_counts={4: 8}, value_counts={4: 8}, n_tokens=64, key_mean=True)
    case.angles = None
    with pytest.raises(OptionError, match="angles"):
        attend(case)


@pytest.mark.parametrize(("counts", "gain"), [(MIXED, True), (MIXED, False), ({16: 7, 2: 5}, True)])
def test_packing_is_that_of_the_format(counts: dict[int, int], gain: bool) -> None:
    torch.manual_seed(0)
    half = torch.cat([torch.full((n,), 2.0 ** (b % 16 - 1)) for b, n in counts.items()])
    latents = torch.randn(2, 96, sum(counts.values())) * half * 0.6
    words = torch.full((2, 4, row_words(counts, has_gain=gain) + 3), -7, dtype=torch.int32)
    site = moved(PackedSite(words, counts, torch.zeros(len(half), 8).half(), None, gain), DEVICE)
    pack_latents(latents.to(DEVICE), site, first_block=1)
    words = site.words.cpu()
    expected = packed_by_hand(latents, counts, half, gain)
    assert torch.equal(words[:, 1:, : expected.shape[2]], expected)
    words[:, 1:, : expected.shape[2]] = -7
    assert (words == -7).all()  # nothing else was written


TILED: dict[str, dict[int, list[int]]] = {  # components of each group
    "all classes, gains": {16: [8, 4], 8: [4, 8], 4: [72, 4], 2: [12, 68], 1: [4, 20]},
    "classes that a group lacks": {8: [0, 4, 8], 4: [12, 0, 4], 1: [0, 0, 72]},
    "numbers alone": {16: [36, 0, 100]},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", TILED)
def test_packing_in_tiles_is_that_of_the_reference(part: Part, name: str) -> None:
    torch.manual_seed(0)
    groups, counts = TILED[name], {bits: sum(sizes) for bits, sizes in TILED[name].items()}
    each = [(b, g) for b, sizes in groups.items() for g, n in enumerate(sizes) for _ in range(n)]
    bits, group = (torch.tensor(x) for x in zip(*each, strict=True))
    tiles, gain = Tiles(part, bits, group, torch.device("cpu")), min(counts) < 16
    half = 2.0 ** (bits % 16 - 1)
    latents = torch.randn(2, 96, len(bits)) * half * 0.6
    latents[0, 0, :4] = 1e6  # beyond the range of any code, and of float16
    words = torch.full((2, 4, row_words(counts, has_gain=gain) + 3), -7, dtype=torch.int32)
    site = moved(PackedSite(words, counts, torch.zeros(len(bits), 8).half(), None, gain), DEVICE)
    pack_latents(latents.to(DEVICE), site, first_block=1, tiles=Tiles(part, bits, group, torch.device(DEVICE)))
    words = site.words.cpu()
    codes, gains = codes_by_hand(latents, counts, half, gain)
    codes[..., bits == 16] = codes[..., bits == 16].clamp(-65504, 65504)
    expected = tiles.pack(codes).view(torch.int32)
    if gain:
        expected = torch.cat([expected, pack_codes([(4, gains[:, None])])], -1)
    assert torch.equal(words[:, 1:, : expected.shape[2]], expected)
    words[:, 1:, : expected.shape[2]] = -7
    assert (words == -7).all()  # nothing else was written


def packed_by_hand(latents: torch.Tensor, counts: dict[int, int], half: torch.Tensor, gain: bool) -> torch.Tensor:
    (all_codes, gains), codes, start = codes_by_hand(latents, counts, half, gain), [], 0
    for bits, n in counts.items():
        part = all_codes[..., start : start + n]
        codes.append((bits, (part.half().view(torch.int16) if bits == 16 else part).transpose(1, 2)))
        start += n
    words = [pack_codes(codes)] + ([pack_codes([(4, gains[:, None])])] if gain else [])
    return torch.cat(words, -1)


def codes_by_hand(
    latents: torch.Tensor, counts: dict[int, int], half: torch.Tensor, gain: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of all components, of 16 bits the numbers themselves, and of the gains [batch, n_tokens]."""
    n_numbers = counts.get(16, 0)
    z, half = latents[..., n_numbers:], half[n_numbers:]

    def quantised(g: torch.Tensor) -> torch.Tensor:
        return ((z / g).floor() + half).clamp_min(0).minimum(2 * half - 1)

    gains = torch.exp2((torch.arange(16) - 4) / 4)
    errors = [((quantised(g) - half + 0.5) * g - z).square().sum(-1) for g in gains]
    best = torch.stack(errors).argmin(0) if gain else torch.full(latents.shape[:2], 4)
    own = gains[best].unsqueeze(-1)
    return torch.cat([latents[..., :n_numbers] / own, quantised(own)], -1), best


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("rotated", [False, True])
def test_heads_are_centred_as_the_reference_does_it(head_dim: int, rotated: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 3, head_dim).half().transpose(1, 2)
    mean = torch.randn(3 * head_dim) if rotated else None
    rotary = Rotary(1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim), 1.25) if rotated else None
    positions = torch.randint(-50, 5000, (2, 40))
    expected = x.float() if rotary is None else rotary.unrotate(x, positions)
    expected = expected.transpose(1, 2).flatten(2) - (0 if mean is None else mean)
    if rotary is not None:
        rotary.inv_freq = rotary.inv_freq.to(DEVICE)
    ours = centred(x.to(DEVICE), None if mean is None else mean.to(DEVICE), rotary, positions.to(DEVICE))
    torch.testing.assert_close(ours.cpu().float(), expected, atol=2e-3, rtol=1e-3)


def test_packing_refuses_what_does_not_fit() -> None:
    site = PackedSite(torch.zeros(1, 1, 8, dtype=torch.int32), {4: 2}, torch.zeros(2, 8).half())
    with pytest.raises(OptionError, match="do not fit"):
        pack_latents(torch.zeros(1, 64, 2), site)
    with pytest.raises(OptionError, match="cannot hold"):
        PackedSite(torch.zeros(1, 1, 7, dtype=torch.int32), {4: 2}, torch.zeros(2, 8).half())
