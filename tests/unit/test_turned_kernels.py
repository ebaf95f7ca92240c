"""The CUDA kernels for keys in turns against float64: on a GPU, and in the emulator where there is a C++ compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.kernels import turned
from kvcompress.kernels.arguments import ExactTokens
from kvcompress.kernels.group_layout import GroupLayout, decoder_fragments, group_layout, head_decoders, largest_rows
from kvcompress.kernels.launch_shapes import CODES, NUMBERS
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.turned import MOST_EXACT, GroupedSite, applies, turned_attention
from tests import emulator
from tests.turned_cases import random_site


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


SITE = {8: [4, 8], 4: [40, 16], 2: [32, 36], 1: [4, 16]}  # components of each group
CASES: dict[str, dict[str, Any]] = {
    "no gains": {"counts": SITE},
    "gains, unequal lengths, bfloat16": {
        "counts": SITE, "gain": True, "turn": 256, "dtype": torch.bfloat16, "first": [4, 50], "last": [402, 257],
    },
    "ranks only": {"counts": {16: [20, 36]}, "kv_heads": 2, "head_dim": 128, "n_blocks": 50},
    "whole sets of numbers": {"counts": {16: [64, 64]}, "kv_heads": 2, "head_dim": 128, "n_blocks": 50},
    "ranks only, the 8B shape": {
        "counts": {16: [128] * 4}, "heads": 32, "kv_heads": 8, "head_dim": 128, "n_blocks": 131, "turn": 256,
        "dtype": torch.bfloat16, "first": [4, 50], "last": [4192, 257],
    },
    "ranks only, many query heads, masks": {
        "counts": {16: [44]}, "heads": 8, "kv_heads": 1, "n_blocks": 70, "masked": True, "first": [0, 160],
        "emulated_blocks": 29,
    },
    "ranks only, eight KV heads in a group": {"counts": {16: [36]}, "kv_heads": 8},
    "ranks only, three KV heads in a group": {"counts": {16: [20, 24]}, "heads": 6, "kv_heads": 6, "n_blocks": 70},
    "ranks only, few columns, a sequence without packed tokens": {
        "counts": {16: [20] * 3}, "heads": 6, "kv_heads": 3, "head_dim": 96, "last": [352, 0], "dtype": torch.bfloat16,
    },
    "all classes, numbers in one group only": {"counts": SITE | {16: [0, 40]}, "gain": True},
    "masks, an empty class in one group": {
        "counts": {4: [12, 32, 4], 1: [40, 0, 20]}, "heads": 6, "kv_heads": 3, "head_dim": 96, "gain": True,
        "masked": True,
    },
    "the 8B shape, several splits": {
        "counts": {8: [8] * 4, 4: [72] * 4, 2: [56] * 4, 1: [40] * 4}, "heads": 32, "kv_heads": 8, "head_dim": 128,
        "n_blocks": 131, "gain": True, "dtype": torch.bfloat16,
    },
    "so much of a token that units are halves": {
        "counts": {8: [100, 104], 4: [8, 8]}, "head_dim": 128, "kv_heads": 2, "gain": True, "turn": 256,
        "last": [390, 41],
    },
    "wide heads, a sequence without packed tokens": {
        "counts": {4: [20] * 4}, "heads": 4, "kv_heads": 4, "head_dim": 256, "n_blocks": 3, "gain": True,
        "first": [0, 96],
    },
    "three KV heads in two passes, masks": {
        "counts": {8: [8], 4: [36], 2: [20], 1: [12]}, "heads": 9, "kv_heads": 3, "gain": True, "masked": True,
        "first": [4, 50],
    },
    "a pass for each of two KV heads, bfloat16": {
        "counts": {8: [4, 8], 4: [24, 36], 1: [8, 0]}, "heads": 28, "kv_heads": 4, "gain": True, "turn": 256,
        "dtype": torch.bfloat16, "last": [402, 257],
    },
    "two full passes of two KV heads each, ranks only": {
        "counts": {16: [36]}, "heads": 16, "kv_heads": 4, "n_blocks": 9,
    },
    "one packed token, one exact": {
        "counts": {8: [92], 1: [4]}, "heads": 7, "kv_heads": 1, "head_dim": 128, "n_blocks": 9, "gain": True,
        "n_recent": 1, "n_sinks": 0, "last": [1, 1],
    },
    "exact tokens in three parts, one of them unseen": {
        "counts": SITE, "n_blocks": 4, "n_recent": 92, "masked": True, "unseen": (32, 64),
    },
    "exact tokens alone, of one part in three": {
        "counts": SITE, "n_blocks": 4, "n_recent": 75, "n_sinks": 21, "masked": True, "unseen": (0, 64), "last": [0, 0],
    },
    "the most exact tokens": {
        "counts": {4: [20, 32]}, "heads": 6, "kv_heads": 2, "head_dim": 96, "n_blocks": 5, "n_recent": MOST_EXACT,
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


def random_case(
    device: str, *, counts: dict[int, list[int]], batch: int = 2, heads: int = 8, kv_heads: int = 4, head_dim: int = 64,
    n_blocks: int = 22, turn: int = 128, gain: bool = False, masked: bool = False, dtype: torch.dtype = torch.float16,
    first: list[int] | None = None, last: list[int] | None = None, n_recent: int = 70, n_sinks: int = 4,
    unseen: tuple[int, int] | None = None,
) -> Case:  # fmt: skip
    torch.manual_seed(0)
    keys, key_z, key_decoder = random_site("key", batch, n_blocks, counts, kv_heads, head_dim, gain)
    values, value_z, value_decoder = random_site("value", batch, n_blocks, counts, kv_heads, head_dim, gain)
    assert keys.mean is not None and values.mean is not None
    n_tokens, slot = n_blocks * 32, torch.arange(n_blocks * 32)
    query = torch.randn(batch, heads, 1, head_dim).to(dtype)
    exact = [torch.randn(batch, kv_heads, n, head_dim).to(dtype) for n in (n_recent, n_recent, n_sinks, n_sinks)]
    exact_mask = (torch.rand(batch, n_sinks + n_recent) > 0.3).to(torch.uint8) if masked else None
    if exact_mask is not None and unseen is not None:
        exact_mask[:, slice(*unseen)] = 0
    mask = (torch.rand(batch, n_tokens) > 0.3).to(torch.uint8) if masked else None
    lo, hi = torch.tensor(first or [0] * batch), torch.tensor(last or [n_tokens] * batch)
    position = torch.arange(-(-n_tokens // turn)) * turn - 7 * torch.arange(batch)[:, None]  # sequences begin anywhere
    angle = position[..., None] * 1e4 ** -(torch.arange(head_dim // 2) * 2 / head_dim)

    def decoded(z: Tensor, decoder: Tensor, site: GroupedSite) -> Tensor:
        return (z @ decoder.double() + site.mean).unflatten(-1, (kv_heads, head_dim)).transpose(1, 2)

    key, of_turn = decoded(key_z, key_decoder, keys), angle.double()[:, slot // turn][:, None]
    re, im = key.chunk(2, -1)
    key = torch.cat([re * of_turn.cos() - im * of_turn.sin(), im * of_turn.cos() + re * of_turn.sin()], -1)
    key = torch.cat([key, exact[2].double(), exact[0].double()], 2).repeat_interleave(heads // kv_heads, 1)
    value = torch.cat([decoded(value_z, value_decoder, values), exact[3].double(), exact[1].double()], 2)
    seen = (slot >= lo[:, None]) & (slot < hi[:, None])
    beside = torch.ones(batch, n_sinks + n_recent, dtype=torch.bool)
    if mask is not None and exact_mask is not None:
        seen, beside = seen & (mask != 0), exact_mask != 0
    scores = (query.double() @ key.transpose(-1, -2)) * head_dim**-0.5
    weights = scores.masked_fill(~torch.cat([seen, beside], 1)[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = (weights @ value.repeat_interleave(heads // kv_heads, 1)).transpose(1, 2)

    def moved(site: GroupedSite) -> GroupedSite:
        layout = replace(site.layout, table=site.layout.table.to(device))
        moved = {name: getattr(site, name).to(device) for name in ("words", "maps", "mean", "largest_rows")}
        return replace(site, layout=layout, **moved)

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
    sizes = dict(CASES[name])
    most = sizes.pop("emulated_blocks", 9 if sizes.get("heads", 8) > 8 else 13)
    if device == "cpu":  # the emulator takes a second for two units of 128 tokens
        sizes["n_blocks"] = min(sizes.get("n_blocks", 13), most)
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


@pytest.mark.parametrize("names", [CODES, NUMBERS])
def test_the_first_launch_waits_for_all_before_it_and_the_others_overlap(
    names: tuple[str, ...], monkeypatch: Any
) -> None:
    memory: dict[str, int] = {}

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def set_shared_memory_config(self, n_bytes: int) -> None:
            memory[self.name] = n_bytes

    def compiled(source: str, name: str, device: torch.device) -> Any:
        assert source.startswith("#define WARPS 8\n") and name == names[0]
        return SimpleNamespace(**{n: Kernel(n) for n in names if f"{n}(" in source})

    monkeypatch.setattr(turned, "compiled", compiled)
    monkeypatch.setattr(turned, "overlapping", lambda kernel, device: ("overlapping", kernel.name))
    first, *others = turned._kernels((("WARPS", 8),), names, 1000, torch.device("cuda", 0))
    turned._kernels.cache_clear()
    assert first.name == names[0] and others == [("overlapping", name) for name in names[1:]]
    assert memory.pop("combine") > 2**16 and memory == {names[-2]: 1000}


def test_group_layout_says_where_groups_begin() -> None:
    layout = group_layout([8] * 4 + [4] * 12 + [1] * 4, [0] * 4 + [0] * 4 + [1] * 8 + [1] * 4, 2)
    assert layout is not None
    assert layout.sets == (0, 1, 0, 1) and layout.n_words == 64 and not layout.has_holes
    assert layout.table.tolist() == [[0, 48, 0, 48, 48, 0], [48, 36, 0, 32, 32, 0]]
    assert layout.rows[0, :13].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, -1]
    assert layout.factors[0, :13].tolist() == [16] * 4 + [1] * 8 + [0]
    assert layout.rows[1, 32:37].tolist() == [16, 17, 18, 19, -1]


@pytest.mark.parametrize(
    ("bits", "group"), [([4] * 6, [0] * 6), ([4] * 4, [0, 0, 1, 1]), ([32] * 4, [0] * 4), ([], [])]
)
def test_group_layout_is_of_whole_quads(bits: list[int], group: list[int]) -> None:
    assert group_layout(bits, group, 2) is None


def test_fragments_hold_every_component_where_the_matrix_units_look_for_it() -> None:
    layout = group_layout([16] * 8 + [4] * 40 + [1] * 4, [0] * 4 + [1] * 4 + [0] * 36 + [1] * 4 + [1] * 4, 2)
    assert layout is not None and layout.has_holes
    decoder = torch.randn(52, 4 * 64).half()
    decoders = head_decoders(decoder, layout, 4)
    assert torch.equal(decoders[1, 32 + 35], decoder[8 + 35, 64:128])  # numbers take 32 places
    fragments = decoder_fragments(decoders, layout.sets[0])
    assert fragments.shape == (4, 1 + 2 + 1, 4, 2, 32, 2, 4)
    # a number, pair 1 of head 3: column 2 of tile 0; dimensions 2 * 8 + 4 .. of the second half for lane c = 2
    assert torch.equal(fragments[3, 0, 0, 1, 4 * 2 + 2, 1], decoder[4 + 2, 192 + 32 + 20 : 192 + 32 + 24])
    # code 35 is component 3 of quad 0 of the second set: tile 1, column 1
    assert torch.equal(fragments[1, 2, 1, 0, 4, 0], decoder[8 + 35, 64:68])
    # code 18 is component 2 of quad 4, which lane 0 takes second: tile 3, column 0
    assert torch.equal(fragments[0, 1, 3, 0, 0, 0], decoder[8 + 18, :4])
    # group 1 has 4 codes of 4 bits: nothing in the second set
    assert not fragments[2, 2].any()


def test_no_code_has_a_longer_row_than_is_said() -> None:
    layout = group_layout([16] * 4 + [8] * 4 + [4] * 4, [0] * 12, 1)
    assert layout is not None
    decoder = torch.zeros(12, 2 * 64).half()
    decoder[0], decoder[4, :64], decoder[8, 64:] = (
        9.0,
        0.5,
        3.0,
    )  # numbers do not count, high nibbles are 16 times as long
    assert largest_rows(head_decoders(decoder, layout, 2), layout).tolist() == [16 * 0.5 * 8, 3.0 * 8]
    assert largest_rows(torch.ones(2, 32, 64), group_layout([16] * 4, [0] * 4, 1)).tolist() == [0, 0]  # type: ignore[arg-type]


def test_sizes_that_do_not_fit_are_left_to_the_reference() -> None:
    def layout(bits: int, n: int, n_groups: int) -> GroupLayout:
        found = group_layout([bits] * (n * n_groups), [g for g in range(n_groups) for _ in range(n)], n_groups)
        assert found is not None
        return found

    cpu, four, two = torch.device("cpu"), layout(4, 64, 4), layout(4, 64, 2)
    assert applies(32, 8, 128, four, four, cpu)
    assert applies(32, 8, 128, two, two, cpu)  # two passes
    assert not applies(72, 8, 128, four, four, cpu)  # nine query heads of a KV head
    assert not applies(32, 8, 128, four, two, cpu)
    assert not applies(32, 8, 80, four, four, cpu)
    assert not applies(32, 8, 128, four, layout(1, 32 * 21, 4), cpu)
    assert applies(32, 8, 128, layout(16, 512, 4), layout(16, 512, 4), cpu)
    mixed = group_layout([16] * 1024 + [4] * 8, [g for n in (512, 4) for g in range(2) for _ in range(n)], 2)
    assert mixed is not None and not applies(8, 4, 128, mixed, mixed, cpu)  # no room for a unit
