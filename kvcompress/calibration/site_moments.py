"""The moments of a site: mean m, covariance C and Fisher information F, kept as float64 sums of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.leverage import spread_over
from kvcompress.errors import CalibrationError
from kvcompress.model.model_spec import Site


@dataclass
class SiteMoments:
    """Sums over tokens at one site.

    `partitions` are the stored blocks ([n_blocks, width] each); `outer` holds sum x x^T and `fisher` sum g g^T
    for each of them ([n_blocks, width, width], float64); `total` is sum x ([n], float64). `samples` are some of the
    tokens themselves ([n_samples, n], float32), for what moments cannot tell: the shape of each component's
    distribution, to which its quantiser is fitted. `coherence` ([n], float64, the component that costs most to drop
    first) is how much more dropping one costs than its tokens do one by one (coherence.py); None: not measured.

    `weighed_total`, `weighed_outer` and `weighed_samples` are the same of tokens that count as they were weighed
    (leverage.py), 1 in the mean; zero and empty where they were not.
    """

    partitions: list[Tensor]
    total: Tensor
    outer: list[Tensor]
    fisher: list[Tensor]
    samples: Tensor
    n_tokens: int = 0
    coherence: Tensor | None = None
    weighed_total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    weighed_outer: list[Tensor] = field(default_factory=list)
    weighed_samples: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    #: Tokens evenly spread, [n, width], where `samples` are others.
    typical: Tensor | None = None

    @classmethod
    def empty(cls, partitions: list[Tensor], width: int, device: str | torch.device = "cpu") -> SiteMoments:
        def zeros() -> list[Tensor]:
            shapes = ((p.shape[0], p.shape[1], p.shape[1]) for p in partitions)
            return [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

        total, samples = torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(0, width, device=device)
        return cls(
            [p.to(device) for p in partitions],
            total,
            zeros(),
            zeros(),
            samples,
            weighed_total=total.clone(),
            weighed_outer=zeros(),
            weighed_samples=samples.clone(),
        )

    def add(
        self, x: Tensor, g: Tensor, weight: Tensor | None = None, *, n_samples: int = 0, n_weighed: int = 0
    ) -> None:
        """Add tokens: x, g [n_tokens, n], any dtype; `n_samples` of them, evenly spread, are kept as samples.

        weight: [n_tokens], float64, how much each counts, 1 in the mean; None where they are not weighed. n_weighed: so
        many are kept as weighed samples, evenly spread over the sum of weights: a token may come twice.
        """
        if n_samples:
            chosen = torch.linspace(0, len(x) - 1, min(n_samples, len(x)), device=x.device).round().long()
            self.samples = torch.cat([self.samples, x[chosen].float()])
        if n_weighed and weight is not None:
            chosen = spread_over(weight, min(n_weighed, len(x)))
            self.weighed_samples = torch.cat([self.weighed_samples, x[chosen].float()])
        x, g = x.double(), g.double()
        self.total += x.sum(0)
        added = [(self.outer, x), (self.fisher, g)]
        if weight is not None:
            self.weighed_total += weight @ x
            added.append((self.weighed_outer, weight.sqrt()[:, None] * x))
        for stored, rows in added:
            for partition, sums in zip(self.partitions, stored, strict=True):
                block_rows = rows[:, partition].transpose(0, 1)  # [n_blocks, n_tokens, width]
                sums.baddbmm_(block_rows.transpose(1, 2), block_rows)
        self.n_tokens += x.shape[0]

    def join(self, *later: SiteMoments) -> None:
        """Add the sums of later windows, of the same blocks."""
        for other in later:
            for sums, more in zip(self._sums, other._sums, strict=True):
                sums += more
            self.n_tokens += other.n_tokens
        self.samples = torch.cat([self.samples, *(other.samples for other in later)])
        self.weighed_samples = torch.cat([self.weighed_samples, *(other.weighed_samples for other in later)])

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        return self.total, *self.outer, *self.fisher, self.weighed_total, *self.weighed_outer

    def weighed(self) -> SiteMoments:
        """Return the moments with C, the mean and the samples of tokens that count as they were weighed; F stays.

        Moments without such samples are returned as they are. What is returned shares its tensors.
        """
        if not len(self.weighed_samples):
            return self
        return SiteMoments(
            self.partitions,
            self.weighed_total,
            self.weighed_outer,
            self.fisher,
            self.weighed_samples,
            self.n_tokens,
            self.coherence,
            typical=self.samples,
        )

    @property
    def mean(self) -> Tensor:
        """m: [n], float64."""
        return self.total / self.n_tokens

    def covariance(self, wanted: Tensor, *, centred: bool, device: str = "cpu") -> Tensor:
        """Return C for blocks [n_blocks, width] -> [n_blocks, width, width]: about the mean, or about zero.

        wanted: on the CPU, as the moments are; device: where it is computed.
        """
        second = self._select(self.outer, wanted, device) / self.n_tokens
        if centred:
            mean = self.mean[wanted].to(device)
            second = second - mean.unsqueeze(2) * mean.unsqueeze(1)
        return second

    def fisher_information(self, wanted: Tensor) -> Tensor:
        """Return F = E[g g^T] for blocks [n_blocks, width] -> [n_blocks, width, width]."""
        return self._select(self.fisher, wanted, "cpu") / self.n_tokens

    def partition_with(self, wanted: Tensor) -> Tensor:
        """Return the stored blocks that contain the wanted ones. Raises CalibrationError if there are none."""
        return self.partitions[self._find(wanted)[0]]

    def _select(self, stored: list[Tensor], wanted: Tensor, device: str) -> Tensor:
        index, *places = self._find(wanted)
        block, place = (p.to(device) for p in places)
        return stored[index].to(device)[block.unsqueeze(2), place.unsqueeze(2), place.unsqueeze(1)]

    def _find(self, wanted: Tensor) -> tuple[int, Tensor, Tensor]:
        """Return (stored partition, block of each wanted one [n_blocks, 1], places in it [n_blocks, width])."""
        for index, partition in enumerate(self.partitions):
            places = torch.empty(2, self.total.numel(), dtype=torch.long)
            for b, row in enumerate(partition):
                places[0, row], places[1, row] = b, torch.arange(row.numel())
            block, place = places[0][wanted], places[1][wanted]
            if bool((block == block[:, :1]).all()):
                return index, block[:, :1], place
        raise CalibrationError(
            "the saved moments do not hold the blocks of this basis (they were left out to save memory). "
            "Choose a smaller group or band, or remove the saved moments to calibrate again."
        )

    def check(self, site: Site) -> None:
        """Raise ValueError where sums that were read from a file do not fit together."""
        n = self.total.numel()
        if self.total.shape != (n,) or self.samples.dim() != 2 or self.samples.shape[1] != n or self.n_tokens < 1:
            raise ValueError(f"the sums of {site} are of {n} numbers and {self.n_tokens} tokens, its samples not")
        if not self.partitions:
            raise ValueError(f"{site} has no blocks")
        for partition, outer, fisher in zip(self.partitions, self.outer, self.fisher, strict=True):
            if partition.dim() != 2 or not torch.equal(partition.flatten().sort()[0], torch.arange(n)):
                raise ValueError(f"the blocks of {site} are no partition")
            shape = (*partition.shape, partition.shape[1])
            if outer.shape != shape or fisher.shape != shape:
                raise ValueError(f"the sums of {site} have shape {list(outer.shape)}, its blocks {list(shape)}")
        if [t.shape for t in self.weighed_outer] != [t.shape for t in self.outer]:
            raise ValueError(f"the weighed sums of {site} are not of its blocks")
        if self.weighed_total.shape != (n,) or self.weighed_samples.shape[1:] != (n,):
            raise ValueError(f"the weighed sums of {site} are not of {n} numbers")
        sums = (*self._sums, *([] if self.coherence is None else [self.coherence]))
        if self.coherence is not None and (self.coherence.shape != (n,) or bool((self.coherence < 1).any())):
            raise ValueError(f"the coherence of {site} is no {n} numbers from 1 on")
        samples = self.samples, self.weighed_samples
        finite = all(bool(t.isfinite().all()) for t in (*sums, *samples))
        if any(t.dtype != torch.float32 for t in samples) or not finite or any(t.dtype != torch.float64 for t in sums):
            raise ValueError(f"the sums of {site} are no finite float64 numbers, or its samples no float32")

    def to(self, device: str) -> SiteMoments:
        return SiteMoments(**mapped(vars(self), lambda t: t.to(device)))


def mapped(fields: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a site's fields, each tensor or array changed, lists of them, too."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [change(t) for t in value]
        return value if value is None or isinstance(value, int) else change(value)

    return {name: changed(value) for name, value in fields.items()}
