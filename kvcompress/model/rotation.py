"""How the numbers of a site turn with the position of their token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kvcompress.documents import Within


@dataclass(frozen=True, slots=True)
class Rotation:
    """RoPE of one site: pair i of a head's channels turns by position * frequencies[i] radians.

    Channels start to start + 2 * len(frequencies) turn. interleaved: pairs are neighbours (2i, 2i + 1); by default
    they lie half of the turning channels apart. scale: by which the model multiplies what it turns (YaRN's attention
    factor); any would do, since what it makes larger here it makes smaller before.
    """

    frequencies: Annotated[tuple[float, ...], Within(1, 1 << 15)]
    start: Annotated[int, Within(0, 1 << 16)] = 0
    interleaved: bool = False
    scale: Annotated[float, Within(1e-6, 1e6)] = 1.0

    @property
    def width(self) -> int:
        """How many channels turn."""
        return 2 * len(self.frequencies)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the two channels of each pair."""
        return channel_pairs(self.width, self.start, self.interleaved)


def channel_pairs(width: int, start: int, interleaved: bool) -> list[tuple[int, int]]:
    """Return the pairs among `width` channels from `start` on: neighbours, or half of them apart."""
    first = range(start, start + width, 2) if interleaved else range(start, start + width // 2)
    return [(i, i + (1 if interleaved else width // 2)) for i in first]
