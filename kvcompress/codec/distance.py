"""How far a text is from what was calibrated on, told by its tokens' components and gains.

Components have variance 1 on the calibration text, and its tokens seldom choose the first or the last gain. On text
that the maps do not know, components grow (excess energy), and more tokens are clipped or drowned (gains at the ends).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.options import GAIN_BITS

#: A text is far if its components have this many times the energy that they have on the calibration text ...
_FAR_ENERGY = 2.0
#: ... or if this much more of its gains are at the ends.
_FAR_GAINS = 0.1


@dataclass(frozen=True, slots=True)
class Distance:
    """component_energy: mean square of the components, the geometric mean over sites, 1 on the calibration text.
    gains_at_ends: share of tokens, over all sites, whose gain is the first or the last one."""

    component_energy: float
    gains_at_ends: float

    def is_far(self, typical: Distance) -> bool:
        """Return whether a text at this distance is unlike the calibration text, which is at `typical`."""
        excess = self.component_energy / max(typical.component_energy, 1e-6)
        return excess > _FAR_ENERGY or self.gains_at_ends - typical.gains_at_ends > _FAR_GAINS


class Seen(NamedTuple):
    """What was seen of one site: sums over tokens, which add up over texts."""

    energy: float
    n_at_ends: float
    n_tokens: int

    def plus(self, other: Seen) -> Seen:
        return Seen(self.energy + other.energy, self.n_at_ends + other.n_at_ends, self.n_tokens + other.n_tokens)


class _Watch:
    """What one site's codec encodes: sums over tokens."""

    def __init__(self, skipped: int) -> None:
        self.skipped = skipped
        self.energy = torch.zeros(())
        self.n_at_ends = torch.zeros(())
        self.n_tokens = 0

    def __call__(self, codec: SiteCodec, z: Tensor, code: Tensor | None) -> None:
        """z: [..., n_tokens, R] in units of the steps; code: [..., n_tokens], the gains. The first are skipped."""
        z = z[..., self.skipped :, :] * codec.step
        self.energy = self.energy.to(z.device) + z.square().mean(-1).sum()
        self.n_tokens += z.shape[:-1].numel()
        if code is not None:
            code = code[..., self.skipped :]
            self.n_at_ends = self.n_at_ends.to(z.device) + ((code == 0) | (code == 2**GAIN_BITS - 1)).sum()

    @property
    def seen(self) -> Seen:
        return Seen(float(self.energy), float(self.n_at_ends), self.n_tokens)


@contextmanager
def watched(codecs: Iterable[SiteCodec | None], *, skipped: int = 0) -> Iterator[list[_Watch]]:
    """Within the block the codecs count what they encode, but for the first `skipped` tokens of each call (sinks)."""
    watches = []
    present = [c for c in codecs if c is not None and c.n_components]
    for codec in present:
        codec.watch = _Watch(skipped)
        watches.append(codec.watch)
    try:
        yield watches
    finally:
        for codec in present:
            codec.watch = None


def distance_of(watches: Sequence[_Watch | Seen]) -> Distance | None:
    """Return the distance that watches saw, over sites; None where they saw nothing."""
    seen = [w for w in watches if w.n_tokens]
    if not seen:
        return None
    energies = torch.tensor([float(w.energy) / w.n_tokens for w in seen], dtype=torch.float64)
    at_ends = sum(float(w.n_at_ends) for w in seen) / sum(w.n_tokens for w in seen)
    return Distance(float(energies.clamp_min(1e-12).log().mean().exp()), at_ends)


def seen_of_samples(codec: SiteCodec, samples: Tensor) -> list[_Watch]:
    """Return what is seen of one site, for `distance_of`; the codec is not kept."""
    with watched([codec]) as found:
        if len(samples) and found:
            codec.encode(samples)
    return found
