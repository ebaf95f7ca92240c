"""The whitened eigenproblem against SciPy, and the data-free head basis against the SVD of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from kvcompress.bases import BASES
from kvcompress.calibration.weights_only import weight_moments
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.planning import make_plan
from kvcompress.whitening import FISHER_RIDGE, whitened_eigenbasis


def random_spd(n: int, rng: np.random.Generator, *, is_complex: bool = False) -> np.ndarray:
    a = rng.standard_normal((n, 2 * n))
    if is_complex:
        a = a + 1j * rng.standard_normal((n, 2 * n))
    return a @ a.conj().T / (2 * n)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 24])
def test_energies_are_generalised_eigenvalues(n: int, is_complex: bool) -> None:
    """F^{1/2} C F^{1/2} u = l u has the eigenvalues of C v = l F^{-1} v, F with its ridge."""
    rng = np.random.default_rng(n)
    covariances = [random_spd(n, rng, is_complex=is_complex) for _ in range(3)]
    fishers = [random_spd(n, rng, is_complex=is_complex) for _ in range(3)]
    energy, encoder, decoder = whitened_eigenbasis(
        torch.from_numpy(np.stack(covariances)), torch.from_numpy(np.stack(fishers))
    )
    for b, (c, f) in enumerate(zip(covariances, fishers, strict=True)):
        f = f + FISHER_RIDGE * f.diagonal().real.mean() * np.eye(n)
        expected = scipy.linalg.eigh(c, np.linalg.inv(f), eigvals_only=True)[::-1]
        np.testing.assert_allclose(energy[b].numpy(), expected, rtol=1e-8)
        # The best rank-r error in the F metric is the sum of the remaining eigenvalues: Eckart and Young.
        root = scipy.linalg.sqrtm(f)
        for r in range(n + 1):
            p = decoder[b, :, :r].numpy() @ encoder[b, :r].numpy()
            residual = root @ (np.eye(n) - p)
            error = np.trace(residual @ c @ residual.conj().T).real
            np.testing.assert_allclose(error, expected[r:].sum(), rtol=1e-7, atol=1e-12)


def test_blocks_are_independent() -> None:
    rng = np.random.default_rng(0)
    c, f = (torch.from_numpy(np.stack([random_spd(5, rng) for _ in range(4)])) for _ in range(2))
    together = whitened_eigenbasis(c, f)
    for b in range(4):
        alone = whitened_eigenbasis(c[b : b + 1], f[b : b + 1])
        for ours, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[b].numpy(), expected[0].numpy(), rtol=1e-9, atol=1e-12)


def head_matrix(checkpoint: Any, site: Site) -> np.ndarray:
    """Return the heads' projections, each flattened to one row: [n_kv_heads, head_dim * hidden]."""
    weight, _ = checkpoint.site_weight(site)
    return weight.numpy().reshape(checkpoint.spec.attention(site).n_kv_heads, -1)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "phi3"])
def test_data_free_head_is_the_svd_of_the_projections(tiny_checkpoint: Any, family: str, part: Any) -> None:
    """arXiv 2601.19611: virtual heads are the leading left singular vectors of the stacked head projections."""
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        moments = weight_moments(checkpoint, group=checkpoint.spec.layers[0].n_kv_heads)
        for layer, attention in enumerate(checkpoint.spec.layers):
            site, basis = Site(layer, part), BASES["head"]()
            blocks = basis.blocks(attention)
            fitted = basis.fit(
                moments.sites[site].covariance(blocks, centred=False), moments.sites[site].fisher_information(blocks)
            )
            stacked = head_matrix(checkpoint, site)
            u, s, vt = np.linalg.svd(stacked, full_matrices=False)
            # F is the identity with its ridge, and a dropped component costs half of its energy.
            np.testing.assert_allclose(fitted.energy.numpy(), s**2 * (1 + FISHER_RIDGE) / 2, rtol=1e-9)
            for r in range(1, attention.n_kv_heads + 1):
                components = fitted.components(r)
                encoder = components.encoder.reshape(r, attention.head_dim, -1)[:, 0].numpy()
                decoder = components.decoder.reshape(r, attention.head_dim, -1)[:, 0].numpy()
                rebuilt = decoder.T @ encoder @ stacked
                np.testing.assert_allclose(rebuilt, u[:, :r] @ np.diag(s[:r]) @ vt[:r], atol=1e-9)


def test_data_free_plan_uses_the_same_heads(tiny_checkpoint: Any) -> None:
    """End to end: the encoders that make_plan stores for the paper's recipe span the leading singular vectors."""
    options = CompressOptions(
        keep=0.5, key_basis="head", value_basis="head", policy="uniform", metric="weights", ranks_only=True
    )
    with open_checkpoint(tiny_checkpoint("llama-mha")) as checkpoint:
        _, maps, _ = make_plan(
            checkpoint, weight_moments(checkpoint, group=checkpoint.spec.layers[0].n_kv_heads), options
        )
        for site, site_maps in maps.items():
            u, _, _ = np.linalg.svd(head_matrix(checkpoint, site), full_matrices=False)
            encoder = site_maps.encoder.reshape(2, -1, 4)[:, 0].double().numpy()
            inside = u[:, :2] @ u[:, :2].T
            np.testing.assert_allclose(encoder @ inside, encoder, atol=1e-5 * np.abs(encoder).max())


def test_moments_without_eigenvalues_are_refused() -> None:
    damaged = torch.full((1, 8, 8), float("nan"), dtype=torch.float64)
    with pytest.raises(CalibrationError, match="moments file"):
        whitened_eigenbasis(damaged, damaged)
