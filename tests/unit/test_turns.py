"""Moments of keys in turns: against brute force over distances, for every layout of heads, blocks and RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.turns import turned_moments
from kvcompress.calibration.weights_only import rotations_of_config, weight_moments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.model.model_spec import AttentionSpec, Site
from kvcompress.model.rope import Rotary
from tests.tiny_models import FAMILIES

TURN = 32


def rotated(x: Tensor, distance: Tensor, attention: AttentionSpec, inv_freq: Tensor) -> Tensor:
    """x: [n_tokens, n] -> rotated by each token's distance, as complex numbers, float64."""
    heads = x.double().unflatten(1, (attention.n_kv_heads, attention.head_dim)).clone()
    half = attention.rotary_dim // 2
    pairs = torch.complex(heads[..., :half], heads[..., half : 2 * half])
    angles = distance.double()[:, None, None] * inv_freq.double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    heads[..., :half], heads[..., half : 2 * half] = turned.real, turned.imag
    return heads.flatten(1)


def in_turns(checkpoint: Any) -> dict[Site, int]:
    return {site: TURN for site in checkpoint.spec.sites if site.part == "key"}


@pytest.fixture
def filled(tiny_checkpoint: Any) -> Any:
    """filled(family, group): (checkpoint, moments, tokens x, gradients g) of random keys with a mean."""

    def make(family: str, group: int | None = None) -> tuple[Any, Moments, Tensor, Tensor]:
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            spec = checkpoint.spec.turned(rotations_of_config(checkpoint))
            checkpoint = replace(checkpoint, spec=spec)
        attention = spec.layers[0]
        moments = empty_moments(spec, {"mode": "fisher"}, group=group or attention.n_kv_heads, band=4)
        generator = torch.Generator().manual_seed(0)
        n = attention.width
        mix = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
        x, g = (torch.randn(40, n, generator=generator, dtype=torch.float64) @ m for m in mix)
        x = x + 3 * torch.randn(n, generator=generator, dtype=torch.float64)
        for sums in moments.sites.values():
            sums.add(x, g, n_samples=20)
        return checkpoint, moments, x, g

    return make


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-mqa", "llama-yarn", "qwen3", "phi3-partial"])
@pytest.mark.parametrize("group", [None, 1])  # all heads in a block; each head by itself, and bands
def test_moments_are_those_of_every_distance(filled: Any, family: str, group: int | None) -> None:
    checkpoint, moments, x, g = filled(family, group)
    attention = checkpoint.spec.layers[0]
    inv_freq = Rotary.of_checkpoint(checkpoint.path).inv_freq
    turned = turned_moments(checkpoint.spec, moments, in_turns(checkpoint), seed=0).sites[Site(0, "key")]
    assert len(turned.partitions) == (1 if attention.n_kv_heads == (group or attention.n_kv_heads) else 2)
    every = empty_moments(checkpoint.spec, {}, group=group or attention.n_kv_heads, band=4).sites[Site(0, "key")]
    for d in range(TURN):
        distance = torch.full((len(x),), d)
        every.add(rotated(x, distance, attention, inv_freq), rotated(g, distance, attention, inv_freq))
    for blocks in turned.partitions:
        for centred in (True, False):
            torch.testing.assert_close(
                turned.covariance(blocks, centred=centred), every.covariance(blocks, centred=centred)
            )
        torch.testing.assert_close(turned.fisher_information(blocks), every.fisher_information(blocks))
    torch.testing.assert_close(turned.mean, every.mean)


@pytest.mark.parametrize("family", ["llama-gqa", "phi3-partial"])
def test_samples_are_keys_at_a_distance(filled: Any, family: str) -> None:
    checkpoint, moments, *_ = filled(family)
    attention, inv_freq = checkpoint.spec.layers[0], Rotary.of_checkpoint(checkpoint.path).inv_freq
    before, turned = (
        m.sites[Site(0, "key")]
        for m in (moments, turned_moments(checkpoint.spec, moments, in_turns(checkpoint), seed=3))
    )
    at_every = torch.stack(
        [rotated(before.samples, torch.full((20,), d), attention, inv_freq) for d in range(TURN)], 1
    )  # [n_samples, TURN, n]
    error, distance = (at_every - turned.samples[:, None]).abs().amax(2).min(1)
    assert error.max() < 1e-4 * before.samples.abs().max()
    assert len(distance.unique()) > 8
    again, other = (
        turned_moments(checkpoint.spec, moments, in_turns(checkpoint), seed=s).sites[Site(0, "key")] for s in (3, 4)
    )
    assert torch.equal(again.samples, turned.samples) and not torch.equal(other.samples, turned.samples)


def test_values_and_layers_without_rope_stay(filled: Any) -> None:
    checkpoint, moments, *_ = filled("smollm3")
    assert [a.rotary_dim > 0 for a in checkpoint.spec.layers] == [True, False, True]
    turned = turned_moments(checkpoint.spec, moments, in_turns(checkpoint), seed=0)
    changed = [site for site, sums in turned.sites.items() if sums is not moments.sites[site]]
    assert changed == [Site(0, "key"), Site(2, "key")]
    assert turned.protocol == moments.protocol


def test_data_free_moments_have_no_samples_to_turn(tiny_checkpoint: Any) -> None:
    with open_checkpoint(tiny_checkpoint("llama-bias")) as checkpoint:
        moments = weight_moments(checkpoint, group=2)
        sums = turned_moments(checkpoint.spec, moments, in_turns(checkpoint), seed=0).sites[Site(0, "key")]
    assert sums.samples.shape == (0, 16) and sums.outer[0].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_of_a_config_are_those_of_the_model(
    tiny_checkpoint: Any, tiny_model: Any, family: str, dtype: torch.dtype
) -> None:
    ours, theirs = Rotary.of_checkpoint(tiny_checkpoint(family)), Rotary.of(tiny_model(family, dtype=dtype))
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.scale == theirs.scale
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        assert {2 * len(ours.inv_freq), 0} >= {a.rotary_dim for a in checkpoint.spec.layers}
