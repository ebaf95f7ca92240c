"""Which basis is better than which, and moments at the edge of what arithmetic can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from tests.basis_cases import (
    ATTENTIONS,
    EIGEN,
    HEAD_DIM,
    MAKERS,
    Case,
    phase_average,
    projector,
    ridged,
    select,
    site_maps,
    spd,
)


def loss_in(covariance: Tensor, metric: Tensor, case: Case, n_numbers: int, *, metric_blocks: Tensor) -> float:
    """Return 1/2 tr(F e e^T) of the case's best n_numbers, F and C taken as block-diagonal over metric_blocks."""
    n_items = int((case.fitted.numbers.cumsum(0) <= n_numbers).sum())
    assert int(case.fitted.numbers[:n_items].sum()) == n_numbers
    n = case.attention.width
    c, f = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for block, covariance_block, metric_block in zip(metric_blocks, covariance, metric, strict=True):
        c[block[:, None], block[None, :]] = covariance_block
        f[block[:, None], block[None, :]] = metric_block
    residual = torch.eye(n, dtype=torch.float64) - projector(case, n_items)
    return 0.5 * float((f * (residual @ c @ residual.T)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("best", "others"),
    [
        ("latent", ["per_head", "band-4", "band-2", "frequency", "frequency-whole", "head", "share"]),
        ("band-4", ["band-2", "frequency", "frequency-whole", "head", "share"]),
        ("band-2", ["frequency", "frequency-whole", "head", "share"]),
        ("frequency", ["frequency-whole", "head", "share"]),
        ("frequency-whole", ["head", "share"]),
        ("head", ["share"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_freer_mixing_loses_less(best: str, others: list[str], seed: int) -> None:
    """At the same rank and on the same moments, in the metric that the freer basis sees."""
    spec = ATTENTIONS["mha"]
    full_c, full_f = spd(spec.width, 10 + seed), spd(spec.width, 20 + seed, decay=2)
    cases = {}
    for name in [best, *others]:
        basis = MAKERS[name]()
        blocks = basis.blocks(spec)
        c, f = select(full_c, blocks), select(full_f, blocks)
        cases[name] = Case(spec, basis, blocks, c, f, basis.fit(c, f))
    blocks, c, f = cases[best].blocks, cases[best].covariance, cases[best].fisher
    if best.startswith("frequency"):
        c, f = phase_average(c), phase_average(f)
    if best == "head":
        f = f.mean(0, keepdim=True).expand_as(f)
    for n_numbers in (8, 16, 24):
        losses = {n: loss_in(c, ridged(f), case, n_numbers, metric_blocks=blocks) for n, case in cases.items()}
        for name in others:
            assert losses[best] <= losses[name] * (1 + 1e-9)
        assert losses[best] < losses[others[-1]]  # and not because all of them are equal


DEGENERATE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "zero fisher": lambda c, f: (c, torch.zeros_like(f)),
    "rank-deficient covariance": lambda c, f: (low_rank(c), f),
    "rank-deficient fisher": lambda c, f: (c, low_rank(f)),
    "zero covariance": lambda c, f: (torch.zeros_like(c), f),
    "one dead head": lambda c, f: (dead_head(c), dead_head(f)),
    "tiny": lambda c, f: (1e-8 * c, 1e-16 * f),
    "large": lambda c, f: (1e6 * c, 1e6 * f),
}


def low_rank(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T


def dead_head(moment: Tensor) -> Tensor:
    moment = moment.clone()
    moment[:HEAD_DIM] = moment[:, :HEAD_DIM] = 0
    return moment


@pytest.mark.parametrize("attention_name", ["mha", "mqa"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("degeneration", DEGENERATE)
def test_degenerate_moments_stay_finite(name: str, attention_name: str, degeneration: str) -> None:
    """Finite maps that still invert each other in float32, as they are stored and used."""
    spec, basis = ATTENTIONS[attention_name], MAKERS[name]()
    blocks = basis.blocks(spec)
    c, f = DEGENERATE[degeneration](spd(spec.width, 0), spd(spec.width, 1, decay=2))
    fitted = basis.fit(select(c, blocks), select(f, blocks))
    assert fitted.energy.isfinite().all() and (fitted.energy >= -1e-9).all()
    case = Case(spec, basis, blocks, c, f, fitted)
    x = torch.randn(3, spec.width, generator=torch.Generator().manual_seed(0))
    for n_items in range(case.n_items + 1):
        codec = SiteCodec(site_maps(case, n_items), torch.device("cpu"))
        assert codec.encoder.isfinite().all() and codec.decoder.isfinite().all()
        assert codec.roundtrip(x).isfinite().all()
    assert (codec.roundtrip(x) - x).abs().max() < 0.05


@pytest.mark.parametrize("name", EIGEN)
@pytest.mark.parametrize("deviation", [1e-2, 1.0, 1e2])
def test_maps_of_16_bit_checkpoints_fit_float16(name: str, deviation: float) -> None:
    """Values of small layers have deviations of 0.01, and spectra that fall by eight orders of magnitude."""
    spec, basis = ATTENTIONS["mha"], MAKERS[name]()
    blocks = basis.blocks(spec)
    c, f = deviation**2 * spd(spec.width, 0, decay=8), spd(spec.width, 1, decay=2)
    fitted = basis.fit(select(c, blocks), select(f, blocks))
    maps = site_maps(Case(spec, basis, blocks, c, f, fitted), len(fitted.energy))
    maps = dataclasses.replace(maps, encoder=maps.encoder.half(), decoder=maps.decoder.half(), bits=maps.bits // 2)
    assert maps.encoder.isfinite().all() and maps.decoder.isfinite().all()
    codec = SiteCodec(maps, torch.device("cpu"))
    root = torch.linalg.cholesky(c + 1e-12 * deviation**2 * torch.eye(spec.width, dtype=torch.float64))
    x = (torch.randn(200, spec.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ root.T).float()
    error = (codec.roundtrip(x) - x).square().mean().sqrt()
    assert error < 0.01 * x.square().mean().sqrt()
