"""Formats that store each token and head by itself: what is decoded, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.errors import OptionError
from kvcompress.evaluate.peer_fp4 import FORMATS as FP4
from kvcompress.evaluate.peer_per_token_head import FORMATS as PER_TOKEN_HEAD
from kvcompress.evaluate.peer_turboquant import PRESETS, hadamard, lloyd_max
from kvcompress.evaluate.peers import TOKEN_FORMATS
from kvcompress.evaluate.token_formats import pack, unpack

HEAD_DIM = 64


def seen(form, x: torch.Tensor, part: str) -> torch.Tensor:
    return form.decode(form.encode(x, part), part, x.shape[-1])


def error(form, part: str, x: torch.Tensor) -> float:
    return float((seen(form, x, part) - x).square().sum() / x.square().sum())


@given(bits=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_is_undone_and_leaves_no_gaps(bits: int, n: int, seed: int) -> None:
    codes = torch.randint(2**bits, (3, n), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize(
    ("bits", "levels"), [(1, [0.7979]), (2, [0.4528, 1.5104]), (3, [0.2451, 0.756, 1.3439, 2.1519])]
)
def test_levels_are_those_of_max(bits: int, levels: list[float]) -> None:
    """Max, IRE Trans. Inf. Theory 6 (1960), table I."""
    found = lloyd_max(HEAD_DIM, bits) * HEAD_DIM**0.5
    assert torch.allclose(found[2 ** (bits - 1) :], torch.tensor(levels), atol=2e-4)
    assert torch.allclose(found, -found.flip(0), atol=1e-6)


def test_the_rotation_is_its_own_inverse() -> None:
    assert torch.allclose(hadamard(HEAD_DIM) @ hadamard(HEAD_DIM), torch.eye(HEAD_DIM), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "value"), [("k8v4", 7e-4, 0.009), ("4bit_nc", 0.0095, 0.009), ("3bit_nc", 0.0345, 0.04)]
)
def test_turboquant_loses_what_its_levels_lose(name: str, key: float, value: float) -> None:
    """On vectors of any direction, one number far larger than the others included."""
    x = torch.randn(4000, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    spiked = x.clone()
    spiked[:, 3] *= 20
    assert error(PRESETS[name], "key", x) == pytest.approx(key, rel=0.15)
    assert error(PRESETS[name], "key", spiked) < 1.5 * key
    assert error(PRESETS[name], "value", x) == pytest.approx(value, rel=0.15)


def test_renormalised_keys_keep_their_norm() -> None:
    x = torch.randn(100, HEAD_DIM, generator=torch.Generator().manual_seed(1)) * 7
    assert torch.allclose(seen(PRESETS["3bit_nc"], x, "key").norm(dim=1), x.norm(dim=1), rtol=2e-3)


def test_whole_numbers_are_rounded_as_vllm_does() -> None:
    """Half away from zero, at the scale of the largest; the largest is exact."""
    x = torch.tensor([[127.0, 2.5, -2.5, 0.4, -126.5]])
    assert seen(PER_TOKEN_HEAD["int8"], x, "key").tolist() == [[127, 3, -3, 0, -127]]


@pytest.mark.parametrize("part", ["key", "value"])
def test_nvfp4_is_exact_on_its_own_numbers(part: str) -> None:
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6])
    x = torch.cat([levels * 2.0**k for k in (-4, 0, 1, 5)])[None]
    assert torch.equal(seen(FP4["nvfp4"], x, part), x)


def test_ultraquants_scale_is_a_power_of_two() -> None:
    x = torch.randn(2000, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    assert error(FP4["ultraquant"], "value", x) == pytest.approx(0.018, rel=0.1)
    assert torch.equal(seen(FP4["ultraquant"], 4 * x, "value"), 4 * seen(FP4["ultraquant"], x, "value"))


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("turboquant-k8v4", 100),
        ("turboquant-4bit_nc", 70),
        ("turboquant-3bit_nc", 54),
        ("int8-per-token-head", 136),
        ("fp8-per-token-head", 136),
        ("nvfp4", 72),
        ("ultraquant", 68),
    ],
)
def test_bytes_are_those_of_the_storages(name: str, n_bytes: int) -> None:
    form, x = TOKEN_FORMATS[name], torch.randn(1, HEAD_DIM)
    assert sum(t.nbytes for part in ("key", "value") for t in form.encode(x, part)) == n_bytes
    assert form.head_bytes(HEAD_DIM) == n_bytes


def test_a_head_that_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(OptionError, match="power of two, found 80"):
        PRESETS["4bit_nc"].head_bytes(80)
    with pytest.raises(OptionError, match="found 8"):
        FP4["nvfp4"].head_bytes(8)
