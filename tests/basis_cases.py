"""Every basis, fitted to seeded moments that have the symmetry it can see: what the basis tests start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.bases import BASES, Basis, Components
from kvcompress.bases.base import FittedBasis
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.model.model_spec import AttentionSpec, Projection
from kvcompress.whitening import FISHER_RIDGE

HEAD_DIM = 8


def attention(n_kv_heads: int, rotary_dim: int = HEAD_DIM) -> AttentionSpec:
    projection = Projection("w", None, "m", 0, n_kv_heads * HEAD_DIM)
    return AttentionSpec(0, n_kv_heads, n_kv_heads, HEAD_DIM, rotary_dim, projection, projection)


ATTENTIONS = {
    "mha": attention(4),
    "two-heads": attention(2),
    "mqa": attention(1),
    "partial": attention(4, rotary_dim=4),
    "no-rope": attention(4, rotary_dim=0),
}
MAKERS: dict[str, Callable[[], Basis]] = {
    **BASES,
    "frequency-whole": lambda: BASES["frequency"](whole_heads=True),
    "band-4": lambda: BASES["band"](4),
    "band-2": lambda: BASES["band"](2),
    "latent-group": lambda: BASES["latent"](1),
    "latent-unit": lambda: BASES["latent"](unit=4),
    "latent-quads": lambda: BASES["latent"](at_a_time=4),
    "per_head-quads": lambda: BASES["per_head"](at_a_time=4),
}
EIGEN = [name for name in MAKERS if name != "share"]


def spd(n: int, seed: int, decay: float = 4.0) -> Tensor:
    """Return a random symmetric positive definite [n, n] whose eigenvalues span 10^-decay to 1."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (q * torch.logspace(0, -decay, n, dtype=torch.float64)) @ q.T


def select(moment: Tensor, blocks: Tensor) -> Tensor:
    """Return the blocks [n_blocks, w, w] of a full moment [n, n]."""
    return moment[blocks.unsqueeze(2), blocks.unsqueeze(1)]


def phase_average(moment: Tensor) -> Tensor:
    """Return the part of moments of (re, im) that a common phase leaves alone."""
    h = moment.shape[1] // 2
    turn = torch.zeros(2 * h, 2 * h, dtype=torch.float64)
    turn[:h, h:], turn[h:, :h] = -torch.eye(h), torch.eye(h)
    return (moment + turn @ moment @ turn.T) / 2


def ridged(fisher: Tensor) -> Tensor:
    """Return F with the ridge that the eigen bases add to it."""
    mean = fisher.diagonal(dim1=1, dim2=2).mean(1)
    return fisher + FISHER_RIDGE * mean[:, None, None] * torch.eye(fisher.shape[1], dtype=torch.float64)


class Case(NamedTuple):
    """A fitted basis, with moments of the symmetry that the basis can see, so that its energies are exact."""

    attention: AttentionSpec
    basis: Basis
    blocks: Tensor
    covariance: Tensor
    fisher: Tensor
    fitted: FittedBasis

    def components(self, n_items: int) -> Components:
        return self.fitted.components(n_items)

    @property
    def n_items(self) -> int:
        return len(self.fitted.energy)


def make_case(name: str, attention_name: str, seed: int = 0) -> Case:
    spec, basis = ATTENTIONS[attention_name], MAKERS[name]()
    blocks = basis.blocks(spec)
    covariance = select(spd(spec.width, seed), blocks)
    fisher = select(spd(spec.width, seed + 1, decay=2), blocks)
    if basis.name == "frequency":
        covariance, fisher = phase_average(covariance), phase_average(fisher)
    if basis.name in ("head", "share"):
        fisher = fisher.mean(0, keepdim=True).expand_as(fisher)
    if basis.name == "share":  # groups are priced one by one, as if the loss of one did not see the others' errors
        fisher = torch.diag_embed(fisher.diagonal(dim1=1, dim2=2))
    return Case(spec, basis, blocks, covariance, fisher, basis.fit(covariance, fisher))


def projector(case: Case, n_items: int) -> Tensor:
    """Return D E over the whole site, [n, n]."""
    n = case.attention.width
    matrix = torch.zeros(n, n, dtype=torch.float64)
    components = case.components(n_items)
    for encoder, decoder, block in zip(components.encoder, components.decoder, components.block.tolist(), strict=True):
        places = case.blocks[block]
        matrix[places[:, None], places[None, :]] += decoder[:, None] * encoder[None, :]
    return matrix


def site_maps(case: Case, n_items: int, mean: Tensor | None = None) -> SiteMaps:
    components = case.components(n_items)
    return SiteMaps(
        blocks=case.blocks.int(),
        encoder=components.encoder.float(),
        decoder=components.decoder.float(),
        block=components.block.int(),
        bits=torch.full(components.block.shape, 32, dtype=torch.uint8),
        step=torch.ones(components.block.shape),
        mean=mean,
    )
