"""`uniform`: the same share of every site. `middle`: the same share of some layers, the others left whole."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress.errors import BudgetError, OptionError
from kvcompress.policies.base import Policy, SiteCurve

#: The paper's layer choices (arXiv 2601.19611): the middle half of the layers, or all but the first three.
PRESETS = ("half", "deep")


class Uniform(Policy):
    name = "uniform"

    def allocate(self, curves: Sequence[SiteCurve], budget: int) -> list[int]:
        share = budget / sum(c.width for c in curves)
        return [c.items_within(share * c.width) for c in curves]


class Middle(Policy):
    name = "middle"

    def __init__(self, layers: str = "half") -> None:
        """layers: 'half', 'deep', or a range 'START:STOP' of layer numbers to compress, STOP not included."""
        self.layers = layers
        if layers not in PRESETS:
            bounds = layers.split(":")
            if len(bounds) != 2 or not all(b.isdecimal() for b in bounds) or int(bounds[0]) >= int(bounds[1]):
                raise OptionError(f"layers '{layers}' is none of half, deep, START:STOP (for example 8:24).")

    def layer_range(self, n_layers: int) -> range:
        if self.layers == "half":
            start = (n_layers - n_layers // 2) // 2
            return range(start, start + n_layers // 2)
        start, stop = (3, n_layers) if self.layers == "deep" else map(int, self.layers.split(":"))
        return range(start, min(stop, n_layers))

    def allocate(self, curves: Sequence[SiteCurve], budget: int) -> list[int]:
        chosen = self.layer_range(max(c.site.layer for c in curves) + 1)
        whole = sum(c.width for c in curves if c.site.layer not in chosen)
        compressible = sum(c.width for c in curves if c.site.layer in chosen)
        if whole > budget or not compressible:
            raise BudgetError(
                f"policy middle leaves {whole} of {whole + compressible} cached numbers whole, so keep cannot go below "
                f"{whole / (whole + compressible):.3f} with layers '{self.layers}'. Compress more layers or keep more."
            )
        share = min(1.0, (budget - whole) / compressible)
        return [c.items_within(share * c.width) if c.site.layer in chosen else len(c.numbers) for c in curves]
