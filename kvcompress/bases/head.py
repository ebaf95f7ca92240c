"""`head`: the paper's head-level linear composition (arXiv 2601.19611): one mixing matrix for all channels.

A virtual head is a weighted sum of heads. With C = W W^T and F = I the eigenproblem is the SVD of the heads'
projection matrices, each flattened to one row, exactly as published; with measured moments it is data-aware.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.bases.base import Basis, Components, FittedBasis
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec
from kvcompress.whitening import whitened_eigenbasis


class Head(Basis):
    name = "head"
    parts = ("key", "value")
    commutes_with_rope = True

    def blocks(self, attention: AttentionSpec) -> Tensor:
        return blocks.channels(attention)

    def fit(self, covariance: Tensor, fisher: Tensor) -> FittedBasis:
        """C is summed and F averaged over channels: the part of the loss that a channel-blind mixing can see."""
        energy, encoder, decoder = whitened_eigenbasis(covariance.sum(0, keepdim=True), fisher.mean(0, keepdim=True))
        # Summed C: a virtual head's variance is spread over head_dim numbers; scale each of them to 1.
        per_number = covariance.shape[0] ** 0.5
        return MixedHeads(energy[0] / 2, encoder[0] * per_number, decoder[0].T / per_number, covariance.shape[0])


class MixedHeads(FittedBasis):
    """Virtual heads from one mixing matrix: item t is the virtual head encoder[t] of real heads."""

    def __init__(self, energy: Tensor, encoder: Tensor, decoder: Tensor, head_dim: int) -> None:
        """energy: [H]; encoder, decoder: [H, H], a row for each virtual head."""
        self.energy = energy
        self.numbers = torch.full((len(energy),), head_dim)
        self._encoder, self._decoder, self._head_dim = encoder, decoder, head_dim

    def components(self, n_items: int) -> Components:
        return Components(
            self._encoder[:n_items].repeat_interleave(self._head_dim, 0),
            self._decoder[:n_items].repeat_interleave(self._head_dim, 0),
            torch.arange(self._head_dim).repeat(n_items),
        )
