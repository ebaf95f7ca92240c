"""What a policy is given and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcompress.model.model_spec import Site


@dataclass(frozen=True)
class SiteCurve:
    """What each item of a site is worth and costs, in the order in which items must be kept.

    energy: [n_items] float64, loss paid for leaving the item out; numbers: [n_items], cached numbers it takes.
    """

    site: Site
    energy: Tensor
    numbers: Tensor

    @property
    def width(self) -> int:
        return int(self.numbers.sum())

    def items_within(self, budget: float) -> int:
        """Return how many items fit into `budget` numbers, taken from the front."""
        return int((self.numbers.cumsum(0) <= budget + 1e-9).sum())


class Policy(ABC):
    """Shares out a budget over sites."""

    name: ClassVar[str]

    @abstractmethod
    def allocate(self, curves: Sequence[SiteCurve], budget: int) -> list[int]:
        """Return how many items each curve keeps, together at most `budget` numbers; BudgetError if impossible."""


def tail_energy(energy: Tensor) -> Tensor:
    """Return the loss still to be paid after keeping the first r items, r = 0..n: [n + 1]; the last is exactly 0."""
    tail = energy.flip(0).cumsum(0).flip(0)
    return torch.cat([tail, torch.zeros(1, dtype=tail.dtype)])
