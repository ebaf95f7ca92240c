"""`loss`: reverse water-filling over keys, values and layers together, in nats; the default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcompress.policies.base import Policy, SiteCurve


class Loss(Policy):
    name = "loss"

    def allocate(self, curves: Sequence[SiteCurve], budget: int) -> list[int]:
        """Spend the budget where a cached number saves most loss, until nothing more fits."""
        segments = [(gain, cost, site, items) for site, c in enumerate(curves) for gain, cost, items in _segments(c)]
        segments.sort(key=lambda s: -s[0])
        kept = [0] * len(curves)
        closed = [False] * len(curves)
        left = budget
        for _, cost, site, items in segments:
            # Items are kept in order, so a site whose next segment does not fit is done.
            closed[site] = closed[site] or cost > left
            if not closed[site]:
                left -= cost
                kept[site] += items
        return kept


def _segments(curve: SiteCurve) -> Iterator[tuple[float, int, int]]:
    """Yield (loss saved per number, numbers, items) with falling gains: the concave hull of the curve.

    Where a later item gains more per number than one before it, the two are taken together.
    """
    pooled: list[list[float]] = []  # [energy, numbers, items]
    for energy, numbers in zip(curve.energy.tolist(), curve.numbers.tolist(), strict=True):
        pooled.append([energy, numbers, 1])
        while len(pooled) > 1 and pooled[-1][0] * pooled[-2][1] > pooled[-2][0] * pooled[-1][1]:
            last = pooled.pop()
            pooled[-1] = [a + b for a, b in zip(pooled[-1], last, strict=True)]
    for energy, numbers, items in pooled:
        yield energy / numbers, int(numbers), int(items)
