"""A fitted site: what a policy is told about a restricted basis is true for the whole site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.bases import BASES
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.choose.fitting import FittedSite, fit_site
from kvcompress.model.model_spec import AttentionSpec
from kvcompress.options import CompressOptions

RESTRICTED = ["head", "share", "frequency", "band", "per_head"]


@pytest.fixture
def site(tiny_checkpoint: Any, tiny_moments: Any) -> tuple[AttentionSpec, SiteMoments]:
    """The keys of layer 1 of llama-mha, whose blocks are strongly correlated."""
    with open_checkpoint(tiny_checkpoint("llama-mha")) as checkpoint:
        return checkpoint.spec.layers[1], next(m for s, m in tiny_moments("llama-mha").sites.items() if s == (1, "key"))


def fit(site: tuple[AttentionSpec, SiteMoments], name: str, **options: Any) -> FittedSite:
    attention, moments = site
    basis = BASES[name](4) if name == "band" else BASES[name]()
    return fit_site(basis, moments, attention, "key", CompressOptions(ranks_only=True, **options))


def whole_site_loss(site: tuple[AttentionSpec, SiteMoments], fitted: FittedSite, n_items: int) -> float:
    """Return 1/2 tr(F E[e e^T]) with the full C and F, computed densely."""
    attention, moments = site
    n = attention.width
    whole = torch.arange(n)[None]
    c, f = moments.covariance(whole, centred=fitted.centred)[0], moments.fisher_information(whole)[0]
    components = fitted.basis.components(n_items)
    residual = torch.eye(n, dtype=torch.float64)
    for encoder, decoder, block in zip(components.encoder, components.decoder, components.block.tolist(), strict=True):
        places = fitted.blocks[block]
        residual[places[:, None], places[None, :]] -= decoder[:, None] * encoder[None, :]
    return 0.5 * float((f * (residual @ c @ residual.T)).sum())


def tails(energy: Tensor) -> Tensor:
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


@pytest.mark.parametrize("name", [*RESTRICTED, "latent"])
def test_loss_counts_correlations_between_blocks(site: Any, name: str) -> None:
    fitted = fit(site, name)
    n_items = len(fitted.basis.energy)
    for n in range(n_items + 1):
        expected = whole_site_loss(site, fitted, n)
        assert fitted.loss(fitted.basis.components(n)) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("name", RESTRICTED)
def test_energies_are_those_of_the_whole_site(site: Any, name: str) -> None:
    """Their tails are the dense loss at both ends and close to it in between; a basis's own energies are not."""
    fitted = fit(site, name)
    n_items = len(fitted.energy)
    true = torch.tensor([whole_site_loss(site, fitted, n) for n in range(n_items + 1)], dtype=torch.float64)
    told, believed = tails(fitted.energy), tails(fitted.basis.energy)
    assert (fitted.energy >= 0).all()
    assert (told - true).abs().max() <= 0.1 * true[0]
    if name != "per_head":
        assert (told - true).abs().max() < (believed - true).abs().max()


def test_an_unrestricted_basis_keeps_its_own_energies(site: Any) -> None:
    fitted = fit(site, "latent")
    assert torch.equal(fitted.energy, fitted.basis.energy)


def test_activation_metric_ignores_fisher(site: Any) -> None:
    """Energies are then variances, whose unit is not nats; F is used only for the predicted loss."""
    attention, moments = site
    fitted = fit(site, "latent", metric="activation")
    whole = torch.arange(attention.width)[None]
    variances = torch.linalg.eigvalsh(moments.covariance(whole, centred=True)[0]).flip(0)
    torch.testing.assert_close(fitted.energy, variances * 1.01 / 2)
    fisher = fit(site, "latent")
    half = len(fitted.energy) // 2
    losses = [f.loss(f.basis.components(half)) for f in (fisher, fitted)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize(
    ("name", "part", "folded", "centred"),
    [
        ("latent", "key", False, True),
        ("latent", "value", False, True),
        ("head", "value", False, True),
        ("frequency", "key", False, True),
        ("head", "key", False, True),
        ("latent", "value", True, False),
    ],
)
def test_the_mean_is_subtracted_where_it_can_be(site: Any, name: str, part: Any, folded: bool, centred: bool) -> None:
    attention, moments = site
    options = CompressOptions(key_basis="frequency", folded=folded)
    assert fit_site(BASES[name](), moments, attention, part, options).centred == centred


def test_keys_of_layers_without_rope_count_as_rotated(tiny_checkpoint: Any, tiny_moments: Any) -> None:
    """They are cached as they come, and scored by absorbed queries, next to those of bases that commute with RoPE."""
    with open_checkpoint(tiny_checkpoint("smollm3")) as checkpoint:
        attention = checkpoint.spec.layers[1]
    assert attention.rotary_dim == 0
    moments = next(m for s, m in tiny_moments("smollm3").sites.items() if s == (1, "key"))
    assert fit_site(BASES["latent"](), moments, attention, "key", CompressOptions()).rotated
