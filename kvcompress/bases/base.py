"""What every basis offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.model.model_spec import AttentionSpec, Part


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
