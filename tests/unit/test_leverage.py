"""Tokens that count as their gradients do: the weights, and the moments of weighed tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompress.calibration.leverage import leverages
from kvcompress.calibration.site_moments import SiteMoments

N_HEADS, HEAD_DIM, N_TOKENS = 2, 8, 400


def gradients(seed: int = 0) -> Tensor:
    """Of two heads, the second 1,000 times as large, with directions of very different sizes."""
    g = torch.randn(N_TOKENS, N_HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g *= torch.logspace(0, -3, HEAD_DIM, dtype=torch.float64).repeat(N_HEADS)
    g[:, HEAD_DIM:] *= 1e3
    return g


def test_a_token_counts_as_its_gradient_against_the_others_of_its_window() -> None:
    g = gradients()
    g[7] *= 5
    expected = torch.zeros(N_TOKENS, dtype=torch.float64)
    for own in g.split(HEAD_DIM, 1):
        fisher = own.T @ own / N_TOKENS
        fisher += 0.01 * fisher.diagonal().mean() * torch.eye(HEAD_DIM, dtype=torch.float64)
        expected += ((own @ torch.linalg.inv(fisher)) * own).sum(1)
    found = leverages(g, N_HEADS)
    assert torch.allclose(found, expected / expected.mean(), rtol=1e-4)
    assert found.argmax() == 7 and found[7] > 5


def test_neither_the_unit_nor_one_large_head_decides() -> None:
    """Weights are of directions alike: with |g|^2 the small head would have no say."""
    g = gradients()
    assert torch.allclose(leverages(1e-6 * g, N_HEADS), leverages(g, N_HEADS), rtol=1e-4)
    swapped = g.roll(HEAD_DIM, 1)
    assert torch.allclose(leverages(swapped, N_HEADS), leverages(g, N_HEADS), rtol=1e-4)
    more = g.clone()
    more[3, :HEAD_DIM] *= 10
    assert leverages(more, N_HEADS)[3] > 5 * leverages(g, N_HEADS)[3]


def test_gradients_of_zero_and_not_finite() -> None:
    assert (leverages(torch.zeros(5, 8), 2) == 1).all()
    assert not leverages(torch.full((5, 8), float("nan")), 2).isfinite().any()


def weighed_sums(x: Tensor, g: Tensor, weight: Tensor | None, n_weighed: int = 10) -> SiteMoments:
    sums = SiteMoments.empty([torch.arange(x.shape[1]).reshape(2, -1)], x.shape[1])
    sums.add(x, g, None if weight is None else weight / weight.mean(), n_samples=50, n_weighed=n_weighed)
    return sums


def test_weighed_moments_are_those_of_tokens_that_come_more_than_once() -> None:
    generator = torch.Generator().manual_seed(1)
    x = 2 + torch.randn(60, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    times = torch.randint(0, 4, (60,), generator=generator)
    whole = weighed_sums(x, g, times.double())
    some = SiteMoments.empty(whole.partitions, 8)
    for part in (slice(0, 25), slice(25, 60)):
        more = SiteMoments.empty(whole.partitions, 8)
        more.add(x[part], g[part], times[part] / times.double().mean(), n_samples=9, n_weighed=5)
        some.join(more)
    repeated = weighed_sums(x.repeat_interleave(times, 0), g[: int(times.sum())], None)
    blocks = torch.arange(8).reshape(2, -1)
    for sums in (whole, some):
        weighed = sums.weighed()
        assert torch.allclose(weighed.mean, repeated.mean)
        expected = repeated.covariance(blocks, centred=True)
        assert torch.allclose(weighed.covariance(blocks, centred=True), expected)
        assert torch.equal(weighed.fisher_information(blocks), sums.fisher_information(blocks))
        assert weighed.typical is not None and torch.equal(weighed.typical, sums.samples)
    assert not torch.allclose(whole.mean, repeated.mean)


def test_weighed_samples_come_as_often_as_they_count() -> None:
    x = torch.arange(100.0)[:, None].expand(-1, 8)
    weight = torch.ones(100, dtype=torch.float64)
    weight[40] = 101
    samples = weighed_sums(x, torch.ones(100, 8), weight, n_weighed=100).weighed_samples[:, 0]
    assert (samples == 40).sum() == pytest.approx(50, abs=2) and (samples.diff() >= 0).all()
    assert len(set(samples.tolist())) == pytest.approx(50, abs=3)


def test_tokens_that_were_not_weighed() -> None:
    sums = weighed_sums(torch.randn(20, 8), torch.randn(20, 8), None, n_weighed=10)
    assert sums.weighed() is sums and not len(sums.weighed_samples)
