"""The CUDA kernels for keys in turns against float64: on a GPU, and in the emulator where there is a C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.runtime.kernels import turned
from kvcompress.runtime.kernels.arguments import ExactTokens
from kvcompress.runtime.kernels.turned import (
    MOST_EXACT,
    GroupedSite,
    applies,
    class_table,
    compiler_works,
    decoder_fragments,
    turned_attention,
)
from tests import emulator


@pytest.fixture(params=["cpu", "cuda"])
def device(request: Any, monkeypatch: Any) -> Iterator[str]:
    """Where the kernels run; memory that nothing was written to reads as NaN there."""
    if request.param == "cpu":
        if not emulator.available():
            pytest.skip("needs g++ 12, for the emulator")
        monkeypatch.setattr(turned, "_kernels", emulator.kernels)
    elif not torch.cuda.is_available() or not compiler_works(torch.device("cuda", 0)):
        pytest.skip("needs an NVIDIA GPU")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield str(request.param)
    torch.use_deterministic_algorithms(False)


SITE = {8: [1, 3], 4: [40, 17], 2: [30, 37], 1: [5, 16]}  # components of each group
CASES: dict[str, dict[str, Any]] = {
    "no gains": {"counts": SITE},
    "gains, unequal lengths, bfloat16": {
        "counts": SITE, "gain": True, "turn": 256, "dtype": torch.bfloat16, "first": [4, 50], "last": [402, 257],
    },
    "ranks only": {"counts": {16: [20, 35]}, "kv_heads": 2, "head_dim": 128, "n_blocks": 50},
    "masks, an empty class in one group": {
        "counts": {4: [10, 30, 1], 1: [40, 0, 20]}, "heads": 6, "kv_heads": 3, "head_dim": 96, "gain": True,
        "masked": True,
    },
    "the 8B shape, several splits": {
        "counts": {8: [9] * 4, 4: [71] * 4, 2: [58] * 4, 1: [40] * 4}, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "n_blocks": 131, "gain": True, "dtype": torch.bfloat16,
    },
    "wide heads, a sequence without packed tokens": {
        "counts": {4: [20] * 4}, "heads": 4, "kv_heads": 4, "head_dim": 256, "n_blocks": 3, "gain": True,
        "first": [0, 96],
    },
    "one packed token, one exact": {
        "counts": {8: [90], 1: [3]}, "heads": 7, "kv_heads": 1, "head_dim": 128, "n_blocks": 9, "gain": True,
        "n_recent": 1, "n_sinks": 0, "last": [1, 1],
    },
    "exact tokens in three parts, one of them unseen": {
        "counts": SITE, "n_blocks": 4, "n_recent": 92, "masked": True, "unseen": (32, 64),
    },
    "exact tokens alone, of one part in three": {
        "counts": SITE, "n_blocks": 4, "n_recent": 75, "n_sinks": 21, "masked": True, "unseen": (0, 64), "last": [0, 0],
    },
    "the most exact tokens": {
        "counts": {4: [20, 30]}, "heads": 6, "kv_heads": 2, "head_dim": 96, "n_blocks": 5, "n_recent": MOST_EXACT,
        "batch": 1,
    },
}  # fmt: skip


@dataclass
class Case:
    query: Tensor
    keys: GroupedSite
    values: GroupedSite
    arguments: dict[str, Any]
    expected: Tensor

    def attend(self, **changes: Any) -> Tensor:
        return turned_attention(self.query, self.keys, self.values, **(self.arguments | changes)).double()


def random_site(
    batch: int, n_blocks: int, counts: dict[int, list[int]], kv_heads: int, head_dim: int, gain: bool
) -> Any:
    """Return a site of random codes, and what they stand for: z [batch, n_tokens, R] float64."""
    n_groups, width = len(next(iter(counts.values()))), kv_heads * head_dim
    bits = [b for b in sorted(counts, reverse=True) for n in counts[b] for _ in range(n)]
    group = [g for b in sorted(counts, reverse=True) for g, n in enumerate(counts[b]) for _ in range(n)]
    table = class_table(bits, group, n_groups)
    assert table is not None
    words = torch.randint(-(2**31), 2**31 - 1, (batch, n_blocks, sum(bits) + 4 * gain), dtype=torch.int32)
    if n_numbers := 16 * bits.count(16):
        words[..., :n_numbers] = torch.randn(batch, n_blocks, 2 * n_numbers).half().view(torch.int32)
    decoder, share = torch.zeros(len(bits), width), width // n_groups
    for row, (b, g) in enumerate(zip(bits, group, strict=True)):
        size = (2.0 ** (1 - b) if b < 16 else 1.0) / group.count(g) ** 0.5
        decoder[row, g * share : (g + 1) * share] = torch.randn(share) * size
    classes, chunks = table
    fragments = decoder_fragments(decoder.half(), classes, chunks, kv_heads)
    gain_word = sum(bits) if gain else None
    return GroupedSite(words, classes, chunks, decoder.half(), torch.randn(width), gain_word, fragments), unpacked(
        words, bits, gain_word
    )


def unpacked(words: Tensor, bits: list[int], gain_word: int | None) -> Tensor:
    def fields(first: int, n: int, width: int) -> Tensor:
        lanes = (words[..., first : first + n, None].long() >> (torch.arange(32 // width) * width)) & ((1 << width) - 1)
        return lanes.flatten(2).flatten(1)

    z, word = [], 0
    for b in bits:
        code = fields(word, b, b)
        z.append(code.to(torch.int16).view(torch.half).double() if b == 16 else code.double() - (2.0 ** (b - 1) - 0.5))
        word += b
    gains = 1.0 if gain_word is None else torch.exp2((fields(gain_word, 4, 4).double() - 4) / 4).unsqueeze(-1)
    return torch.stack(z, -1) * gains


def random_case(
    device: str, *, counts: dict[int, list[int]], batch: int = 2, heads: int = 8, kv_heads: int = 4, head_dim: int = 64,
    n_blocks: int = 22, turn: int = 128, gain: bool = False, masked: bool = False, dtype: torch.dtype = torch.float16,
    first: list[int] | None = None, last: list[int] | None = None, n_recent: int = 70, n_sinks: int = 4,
    unseen: tuple[int, int] | None = None,
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    keys, key_z = random_site(batch, n_blocks, counts, kv_heads, head_dim, gain)
    values, value_z = random_site(batch, n_blocks, counts, kv_heads, head_dim, gain)
    assert keys.mean is not None and values.mean is not None
    n_tokens, place = n_blocks * 32, torch.arange(n_blocks * 32)
    query = torch.randn(batch, heads, 1, head_dim).to(dtype)
    exact = [torch.randn(batch, kv_heads, n, head_dim).to(dtype) for n in (n_recent, n_recent, n_sinks, n_sinks)]
    exact_mask = (torch.rand(batch, n_sinks + n_recent) > 0.3).to(torch.uint8) if masked else None
    if exact_mask is not None and unseen is not None:
        exact_mask[:, slice(*unseen)] = 0
    mask = (torch.rand(batch, n_tokens) > 0.3).to(torch.uint8) if masked else None
    lo, hi = torch.tensor(first or [0] * batch), torch.tensor(last or [n_tokens] * batch)
    position = torch.arange(-(-n_tokens // turn)) * turn - 7 * torch.arange(batch)[:, None]  # sequences begin anywhere
    angle = position[..., None] * 1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim)

    def decoded(z: Tensor, site: GroupedSite) -> Tensor:
        assert site.mean is not None
        return (z @ site.decoder.double() + site.mean).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    key, of_turn = decoded(key_z, keys), angle.double()[:, place // turn][:, None]
    re, im = key.chunk(2, -1)
    key = torch.cat([re * of_turn.cos() - im * of_turn.sin(), im * of_turn.cos() + re * of_turn.sin()], -1)
    key = torch.cat([key, exact[2].double(), exact[0].double()], 2).repeat_interleave(heads // kv_heads, 1)
    value = torch.cat([decoded(value_z, values), exact[3].double(), exact[1].double()], 2)
    seen = (place >= lo[:, None]) & (place < hi[:, None])
    beside = torch.ones(batch, n_sinks + n_recent, dtype=torch.bool)
    if mask is not None and exact_mask is not None:
        seen, beside = seen & (mask != 0), exact_mask != 0
    scores = (query.double() @ key.transpose(-1, -2)) * head_dim**-0.5
    weights = scores.masked_fill(~torch.cat([seen, beside], 1)[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = (weights @ value.repeat_interleave(heads // kv_heads, 1)).transpose(1, 2)

    def moved(site: GroupedSite) -> GroupedSite:
        names = ("words", "classes", "decoder", "mean", "fragments")
        return replace(site, **{name: getattr(site, name).to(device) for name in names})

    arguments = {
        "turn": turn,
        "angles": torch.stack([angle.cos(), angle.sin()], -1).float().to(device),
        "first": lo.int().to(device),
        "last": hi.int().to(device),
        "n_blocks": n_blocks,
        "exact": ExactTokens(*(e.to(device) for e in exact), None if exact_mask is None else exact_mask.to(device)),
        "scaling": head_dim**-0.5,
        "mask": None if mask is None else mask.to(device),
    }
    return Case(query.to(device), moved(keys), moved(values), arguments, expected.to(device))


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_float64(name: str, device: str) -> None:
    sizes = CASES[name]
    if device == "cpu":  # the emulator takes a second for two units of 128 tokens
        sizes = sizes | {"n_blocks": min(sizes.get("n_blocks", 13), 9 if sizes.get("heads", 8) > 8 else 13)}
    case = random_case(device, **sizes)
    limit = 3e-3 if case.query.dtype == torch.bfloat16 else 1e-3  # the output is rounded to it
    for n_splits in (None, 1, 3):
        error = (case.attend(n_splits=n_splits) - case.expected).norm() / case.expected.norm()
        assert error < limit


def test_a_query_that_sees_nothing_gives_zero(device: str) -> None:
    case = random_case(device, counts=SITE, first=[288, 0], n_blocks=9, n_recent=2, n_sinks=1)
    blind = torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.uint8, device=device)
    output = case.attend(exact=replace(case.arguments["exact"], mask=blind))
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.isfinite(output).all() and output[1].abs().sum() > 0


def test_class_table_says_where_groups_begin() -> None:
    table = class_table([8, 8, 4, 4, 4, 1], [0, 1, 0, 0, 1, 1], 2)
    assert table is not None
    classes, chunks = table
    assert chunks == (0, 1, 1, 0, 1)
    assert classes[0].tolist() == [[0, 0, 0], [0, 0, 1], [16, 2, 2], [0, 0, 0], [0, 0, 0]]
    assert classes[1].tolist() == [[0, 0, 0], [8, 1, 1], [24, 4, 1], [0, 0, 0], [28, 5, 1]]


@pytest.mark.parametrize(("bits", "group"), [([4, 8], [0, 0]), ([4, 4, 4], [0, 1, 0]), ([32], [0])])
def test_class_table_refuses_other_orders(bits: list[int], group: list[int]) -> None:
    assert class_table(bits, group, 2) is None


def test_fragments_hold_every_component_where_the_matrix_units_look_for_it() -> None:
    classes, chunks = class_table([4] * 20 + [1] * 3, [0] * 17 + [1] * 3 + [1] * 3, 2)  # type: ignore[misc]
    decoder = torch.randn(23, 4 * 64).half()
    fragments = decoder_fragments(decoder, classes, chunks, 4)
    assert fragments.shape == (4, 3, 2, 4, 32, 4)
    # component 16 of group 0 is the first of the second chunk: lanes 0..3 of tile 0; head 1, lane 2, second half
    own = decoder[16, 64:128]
    assert torch.equal(fragments[1, 1, 0, 3, 2], own[32 + 2 * 8 + 4 : 32 + 2 * 8 + 8])
    # component 5 of a chunk stands for column 3: lanes 4 * 3 + c; group 1 has none there
    assert torch.equal(fragments[0, 0, 0, 0, 12], decoder[5, :4])
    assert not fragments[2, 0, 0, :, 12].any()
    # its third 1-bit component, row 22: chunk 2, column 4 of tile 0
    assert torch.equal(fragments[3, 2, 0, 0, 16], decoder[22, 192:196])


def test_sizes_that_do_not_fit_are_left_to_the_reference() -> None:
    fits = (32, 8, 2, 128, (0, 1, 5, 4, 3), (0, 1, 5, 4, 3))
    assert applies(*fits)
    assert not applies(32, 8, 4, *fits[3:])  # 16 columns
    assert not applies(*fits[:3], 80, *fits[4:])
    assert not applies(*fits[:5], (0, 21, 0, 0, 0))
