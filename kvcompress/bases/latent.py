"""`latent` and `per_head`: free mixing inside groups of heads, the optimum for those blocks.

`latent` has one block for all heads (or, for wide models, groups of heads); `per_head` one block a head.
For values both are exact under attention: attend in the latent, decode once. Palu (arXiv 2407.21118) uses
the same blocks with C alone.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from kvcompress.bases.base import Basis, FittedBasis, RankedComponents
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec, Part
from kvcompress.whitening import whitened_eigenbasis


class Latent(Basis):
    name = "latent"
    parts: ClassVar[tuple[Part, ...]] = ("key", "value")

    def __init__(self, group: int | None = None, *, unit: int = 1, at_a_time: int = 1) -> None:
        """group: KV heads per block, None means all of them. unit: components that are kept or dropped together.

        at_a_time: neighbours of one block that are, fewer where they do not divide a block.
        """
        self.group, self.unit, self.at_a_time = group, unit, at_a_time

    def blocks(self, attention: AttentionSpec) -> Tensor:
        return blocks.head_groups(attention, self.group or attention.n_kv_heads)

    def fit(self, covariance: Tensor, fisher: Tensor) -> FittedBasis:
        energy, encoder, decoder = whitened_eigenbasis(covariance, fisher)
        together = (-1, math.gcd(self.at_a_time, energy.shape[1]))
        return RankedComponents(
            energy.unflatten(1, together).sum(2) / 2,
            encoder.unflatten(1, together),
            decoder.transpose(1, 2).unflatten(1, together),
            self.unit,
        )


class PerHead(Latent):
    name = "per_head"

    def __init__(self, *, at_a_time: int = 1) -> None:
        super().__init__(group=1, at_a_time=at_a_time)
