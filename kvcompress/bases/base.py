"""What every basis offers, and the whitened eigenproblem that most of them solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.model.model_spec import AttentionSpec, Part

#: Ridge on F, as a share of its mean diagonal: keeps F^{-1/2} bounded in directions the text never used.
_FISHER_RIDGE = 1e-2
#: Components with less than this share of the largest variance keep their scale instead of being blown up to 1.
_VARIANCE_FLOOR = 1e-8
#: No encoder entry grows beyond about this, so that float16 maps hold it even where the variance is 0.
_ENCODER_LIMIT = 1e3


@dataclass(frozen=True)
class Components:
    """Linear maps of a site: component i lives in block `block[i]`, z_i = encoder[i] . x[blocks[block[i]]].

    encoder, decoder: [n_components, block width]; block: [n_components]. Decoding adds z_i * decoder[i] to the
    numbers of the block.
    """

    encoder: Tensor
    decoder: Tensor
    block: Tensor


class FittedBasis(ABC):
    """A basis fitted to one site. Its items are kept from the front: the first r of them are the best r.

    energy: [n_items] float64, the predicted loss of leaving out item i when those before it are kept, in nats
    a token where F is the Fisher information. numbers: [n_items], how many cached numbers an item takes.
    """

    energy: Tensor
    numbers: Tensor

    @abstractmethod
    def components(self, n_items: int) -> Components:
        """Return the maps that keep the first `n_items` items."""


class Basis(ABC):
    """A way to mix the numbers of a site. `commutes_with_rope` bases may be cached after rotation."""

    name: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]] = ("key",)
    commutes_with_rope: ClassVar[bool] = False

    @abstractmethod
    def blocks(self, attention: AttentionSpec) -> Tensor:
        """Return the blocks that may be mixed: [n_blocks, width], a partition of range(n)."""

    @abstractmethod
    def fit(self, covariance: Tensor, fisher: Tensor) -> FittedBasis:
        """Return the basis fitted to C and F of its blocks, both [n_blocks, width, width] float64."""


def expected_loss(covariance: Tensor, fisher: Tensor, components: Components) -> float:
    """Return 1/2 tr(F E[e e^T]), e the error of decoding the components: the predicted loss, in nats a token.

    covariance, fisher: [n_blocks, width, width]. Terms between blocks are taken as zero.
    """
    decoder, encoder = components.decoder.double(), components.encoder.double()
    identity = torch.eye(covariance.shape[1], dtype=torch.float64)
    loss = 0.0
    for b in range(len(covariance)):
        mine = components.block == b
        residual = identity - decoder[mine].T @ encoder[mine]
        loss += 0.5 * float((fisher[b] * (residual @ covariance[b] @ residual.T)).sum())
    return loss


def whitened_eigenbasis(covariance: Tensor, fisher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (energy, encoder, decoder) of F^{1/2} C F^{1/2} = U L U^T, per block (design, section 2).

    covariance, fisher: [n_blocks, width, width], real symmetric or complex Hermitian. energy: [n_blocks, width],
    l_i, descending. encoder rows and decoder columns are scaled so that every component has variance 1, which
    lets 16-bit storage hold any of them. encoder: [n_blocks, component, width], decoder: [n_blocks, width, component].
    """
    mean_diagonal = fisher.diagonal(dim1=1, dim2=2).real.mean(1)
    ridge = (_FISHER_RIDGE * mean_diagonal).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(fisher.shape[1], dtype=fisher.dtype)
    values, vectors = torch.linalg.eigh(fisher + ridge[:, None, None] * identity)
    values = values.clamp_min(0).sqrt().clamp_min(ridge[:, None].sqrt() * 0.5)
    root = (vectors * values.unsqueeze(1)) @ vectors.mH
    inverse_root = (vectors / values.unsqueeze(1)) @ vectors.mH
    whitened = root @ covariance @ root
    energy, u = torch.linalg.eigh((whitened + whitened.mH) / 2)
    energy, u = energy.flip(1).clamp_min(0), u.flip(2)
    floor = (_VARIANCE_FLOOR * energy[:, :1]).maximum((values.amax(1, keepdim=True) / _ENCODER_LIMIT).square())
    deviation = energy.maximum(floor).sqrt()
    encoder = (u / deviation.unsqueeze(1)).mH @ root
    decoder = inverse_root @ (u * deviation.unsqueeze(1))
    return energy, encoder, decoder


class RankedComponents(FittedBasis):
    """Independent components of several blocks, ranked by energy over the whole site."""

    def __init__(self, energy: Tensor, encoder: Tensor, decoder: Tensor, unit: int = 1) -> None:
        """energy: [n_blocks, k] in nats; encoder, decoder: [n_blocks, k, m, width], m numbers per component.

        unit: an item is this many neighbours in the ranking (it divides n_blocks * k).
        """
        n_blocks, k, m, width = encoder.shape
        order = energy.flatten().argsort(descending=True, stable=True)
        self.energy = energy.flatten()[order].reshape(-1, unit).sum(1)
        self.numbers = torch.full((n_blocks * k // unit,), m * unit)
        self._unit = unit
        self._encoder = encoder.reshape(-1, m, width)[order]
        self._decoder = decoder.reshape(-1, m, width)[order]
        self._block = (order // k).unsqueeze(1).expand(-1, m)

    def components(self, n_items: int) -> Components:
        kept = slice(0, n_items * self._unit)
        return Components(
            self._encoder[kept].flatten(0, 1), self._decoder[kept].flatten(0, 1), self._block[kept].reshape(-1)
        )
