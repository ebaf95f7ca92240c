"""`share`: heads share one stored head (DirectShare and PostShare, arXiv 2402.11819), nothing to decode.

Groups are merged greedily, the pair that costs least first. A group's stored head is the F-weighted mean of its
heads, the best one for a decoder that copies it; the paper keeps one of the heads themselves and retrains.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from kvcompress.bases.base import Basis, Components, FittedBasis
from kvcompress.model import blocks
from kvcompress.model.model_spec import AttentionSpec


class Share(Basis):
    name = "share"
    commutes_with_rope = True

    def blocks(self, attention: AttentionSpec) -> Tensor:
        return blocks.channels(attention)

    def fit(self, covariance: Tensor, fisher: Tensor) -> FittedBasis:
        return SharedHeads(covariance.sum(0), fisher.mean(0), covariance.shape[0])


class SharedHeads(FittedBasis):
    """Item r is what the r-th stored head adds over the best r - 1 groups found."""

    def __init__(self, covariance: Tensor, fisher: Tensor, head_dim: int) -> None:
        """covariance, fisher: [H, H], over channels summed and averaged."""
        self._fisher, self._head_dim = fisher, head_dim
        self._groupings = {len(fisher): [[h] for h in range(len(fisher))]}
        cost: dict[tuple[int, ...], float] = {(h,): 0.0 for h in range(len(fisher))}
        totals = {len(fisher): 0.0}
        for r in range(len(fisher), 1, -1):
            groups = self._groupings[r]

            def merge_cost(pair: tuple[int, int], groups: list[list[int]] = groups) -> float:
                merged = groups[pair[0]] + groups[pair[1]]
                loss = _group_loss(covariance, fisher, merged)
                return loss - cost[tuple(groups[pair[0]])] - cost[tuple(groups[pair[1]])]

            a, b = min(combinations(range(r), 2), key=merge_cost)
            merged = groups[a] + groups[b]
            totals[r - 1] = totals[r] + merge_cost((a, b))
            cost[tuple(merged)] = _group_loss(covariance, fisher, merged)
            self._groupings[r - 1] = [g for i, g in enumerate(groups) if i not in (a, b)] + [merged]
        totals[0] = 0.5 * float((fisher * covariance).sum())
        self.energy = torch.tensor([totals[r] - totals[r + 1] for r in range(len(fisher))], dtype=torch.float64)
        self.numbers = torch.full((len(fisher),), head_dim)

    def components(self, n_items: int) -> Components:
        n_heads = len(self._fisher)
        encoder = torch.zeros(n_items, n_heads, dtype=torch.float64)
        decoder = torch.zeros(n_items, n_heads, dtype=torch.float64)
        for t, group in enumerate(self._groupings.get(n_items, [])):
            encoder[t, group] = _weights(self._fisher, group)
            decoder[t, group] = 1.0
        return Components(
            encoder.repeat_interleave(self._head_dim, 0),
            decoder.repeat_interleave(self._head_dim, 0),
            torch.arange(self._head_dim).repeat(n_items),
        )


def _weights(fisher: Tensor, group: list[int]) -> Tensor:
    """Return w, [len(group)], so that z = w . x minimises (x - 1 z)^T F (x - 1 z)."""
    block = fisher[group][:, group]
    total = float(block.sum())
    if len(group) == 1 or total <= 0:
        return torch.full((len(group),), 1.0 / len(group), dtype=torch.float64)
    return block.sum(0) / total


def _group_loss(covariance: Tensor, fisher: Tensor, group: list[int]) -> float:
    """Return 1/2 tr(F e e^T) of replacing every head of a group by the group's stored head."""
    if len(group) == 1:
        return 0.0
    projector = torch.eye(len(group), dtype=torch.float64) - _weights(fisher, group).expand(len(group), -1)
    error = projector @ covariance[group][:, group] @ projector.T
    return 0.5 * float((fisher[group][:, group] * error).sum())
