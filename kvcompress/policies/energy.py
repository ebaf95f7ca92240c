"""`energy`: every site gives up the same share of its own energy; the share is the smallest that fits."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress.policies.base import Policy, SiteCurve, tail_energy


class Energy(Policy):
    name = "energy"

    def allocate(self, curves: Sequence[SiteCurve], budget: int) -> list[int]:
        fractions = []
        for curve in curves:
            tail = tail_energy(curve.energy)
            fractions.append(tail / tail[0] if tail[0] > 0 else tail)

        def kept(share: float) -> list[int]:
            return [int((f > share).sum()) for f in fractions]

        def cost(items: list[int]) -> int:
            return sum(int(c.numbers[:r].sum()) for c, r in zip(curves, items, strict=True))

        low, high = 0.0, max(1.0, *(float(f.max()) for f in fractions))  # above 1 where an energy is negative (`share`)
        if cost(kept(low)) <= budget:
            return kept(low)
        for _ in range(100):  # halves the interval down to float resolution
            middle = (low + high) / 2
            low, high = (low, middle) if cost(kept(middle)) <= budget else (middle, high)
        return kept(high)
