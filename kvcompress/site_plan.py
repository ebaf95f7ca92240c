"""The plan of one site: how many components it keeps, of what basis, at how many bits each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from kvcompress.documents import DocumentError, Finite, OneOf, Within
from kvcompress.model.model_spec import Part, Site
from kvcompress.options import BLOCK_TOKENS, GAIN_BITS, LEVELS, is_turn

#: Numbers that a site may have, far above any model's; what is repeated or allocated by them stays small.
Width = Annotated[int, Within(1, 1 << 20)]
Bits = Annotated[int, OneOf((*LEVELS, 16, 32))]
Name = Annotated[str, Within(0, 4096)]


def runs(bits: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (bits, first component, one past the last) of each run of components of equal bits."""
    found: list[tuple[int, int, int]] = []
    for i, b in enumerate(bits):
        if found and found[-1][0] == b:
            found[-1] = (b, found[-1][1], i + 1)
        else:
            found.append((b, i, i + 1))
    return found


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What one site keeps. An exact site has no maps and keeps everything in the model's own dtype."""

    layer: Annotated[int, Within(0, 9999)]
    part: Part
    basis: Name
    width: Width
    #: (bits, components) with bits falling: the bits of every component, in the order in which they are stored.
    bits: tuple[tuple[Bits, Annotated[int, Within(0, 1 << 20)]], ...]
    predicted_loss: Finite
    #: Numbers that are mixed together; a component's maps are two vectors of this width.
    block_width: Width
    #: Keys only: encoded after RoPE, because the basis commutes with it, or never rotated; other keys are un-rotated,
    #: encoded and rebuilt.
    rotated: bool
    #: Tokens whose keys are un-rotated by one position, that of the first of them; 1 where each has its own, or none.
    turn: Annotated[int, Within(1, 1 << 20)] = 1
    #: Which of the plan's rotations turns the site with the position; None where none does, or an earlier output.
    rotation: Annotated[int, Within(0, 9999)] | None = None

    @property
    def site(self) -> Site:
        return Site(self.layer, self.part)

    @property
    def rank(self) -> int:
        """Components that are kept."""
        return sum(n for _, n in self.bits)

    @property
    def component_bits(self) -> tuple[int, ...]:
        return tuple(b for b, n in self.bits for _ in range(n))

    @property
    def exact(self) -> bool:
        return self.rank == self.width and not self.quantised

    @property
    def quantised(self) -> bool:
        return any(b < 16 for b, _ in self.bits)

    @property
    def bits_per_token(self) -> int:
        """Bits stored for a token: its components, and its gain where any of them is quantised."""
        return sum(b * n for b, n in self.bits) + (GAIN_BITS if self.quantised else 0)

    def check(self, place: str) -> None:
        """Raise DocumentError where a site that was read from a file is none; `place`: where it stands there."""
        levels = [b for b, _ in self.bits]
        if levels != sorted(set(levels), reverse=True):
            raise DocumentError(f"{place}.bits must be falling, found {levels[:8]}")
        if self.rank > self.width:
            raise DocumentError(f"{place}.bits keep {self.rank} components of {self.width} numbers")
        if self.width % self.block_width:
            raise DocumentError(f"{place}.block_width {self.block_width} does not divide its {self.width} numbers")
        if not is_turn(self.turn):
            raise DocumentError(f"{place}.turn must be 1 or a power of two from {BLOCK_TOKENS} on, found {self.turn}")
