"""The tile layout of packed rows: codes lie as a GPU's matrix units take keys in turns, and values (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.model.model_spec import Part
from kvcompress.options import QUAD
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.site_plan import runs

#: What a group has in its part of a row, in this order: of each class the bits of components whose quads it holds, and
#: how much a code of theirs counts there. Those of 8 bits are high nibbles and low ones.
CLASSES = (((16, 1),), ((8, 16), (8, 1), (4, 1)), ((2, 1),), ((1, 1),))
_ORDER = [kind for kinds in CLASSES for kind in kinds]
#: Where quads of these bits lie within their group; those of 8 bits have their low nibbles at _LOW.
_PLACE = {bits: _ORDER.index((bits, counts)) for bits, counts in _ORDER if (bits, counts) != (8, 1)}
_LOW, _N_PLACES = _ORDER.index((8, 1)), len(_ORDER)


def is_tileable(bits: Tensor, block: Tensor) -> bool:
    """Return whether components come in quads: four neighbours of equal bits in one block. bits, block: [R]."""
    if len(bits) % QUAD or set(bits.tolist()) - set(_PLACE):
        return False
    return all(bool((x.view(-1, QUAD) == x[::QUAD, None]).all()) for x in (bits, block))


def quad_places(bits: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (bits, first word of the row, index in its group's class) of every quad as it is stored: [R / 4 + R8 / 4].

    bits, block: [R], of components that come in quads. The quads of 8 bits have their high nibbles, as 4 bits, among
    the first R / 4, their low ones at the end.
    """
    level, group = bits[::QUAD].long(), block[::QUAD].long()
    halved = level == 8
    place = torch.zeros(17, dtype=torch.long)
    place[list(_PLACE)] = torch.tensor(list(_PLACE.values()))
    place = torch.cat([place[level], torch.full((int(halved.sum()),), _LOW)])
    level = torch.cat([level.where(~halved, 4), torch.full((int(halved.sum()),), 4)])
    group = torch.cat([group, group[halved]])
    size = BLOCK_TOKENS // 8 * level  # words of a quad
    order = (group * _N_PLACES + place).argsort(stable=True)
    start = torch.empty_like(size)
    start[order] = size[order].cumsum(0) - size[order]
    _, of_class = torch.stack([group, level]).unique(dim=1, return_inverse=True)
    first = torch.zeros_like(start).scatter_reduce(0, of_class, start, "amin", include_self=False)[of_class]
    return level, start, (start - first) // size


def tile_places(part: Part, bits: Tensor, block: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (word of the row, lowest bit in it) of every code, [R + R8, 32 tokens] each, or None for other components.

    bits, block: [R]. The R8 components of 8 bits have their high nibbles among the first R, their low ones at the end.
    """
    if not is_tileable(bits, block):
        return None
    level, start, index = quad_places(bits, block)
    word, shift = (torch.empty(len(level), QUAD, BLOCK_TOKENS, dtype=torch.long) for _ in range(2))
    for b in (16, 4, 2, 1):
        mine = level == b
        inside, shift[mine] = _PLACES[part](b, index[mine, None, None])
        word[mine] = start[mine, None, None] + inside
    return word.flatten(0, 1), shift.flatten(0, 1)


def _key_places(bits: int, quad: Tensor) -> tuple[Tensor, Tensor]:
    """Return (word, shift) inside quads of keys, to be broadcast to [n, 4, 32]; quad: their indices, [n, 1, 1]."""
    token, component = torch.arange(BLOCK_TOKENS), torch.arange(QUAD)[:, None]
    half, h, r = token // 16, token // 8 % 2, token % 8
    if bits == 16:
        pair = 2 * quad + component // 2
        return 32 * (component // 2) + ((r + 2 * pair) & 7) * 4 + 2 * half + h, 16 * (component & 1)
    if bits == 4:
        return 2 * (r ^ ((quad & 2) << 1)) + half, 8 * component + 4 * h
    if bits == 2:
        return r, 8 * component + 2 * half + 4 * h
    return r // 2, 8 * component + 4 * h + 2 * (r & 1) + half


def _value_places(bits: int, quad: Tensor) -> tuple[Tensor, Tensor]:
    """Return (word, shift) inside quads of values, as _key_places does it."""
    token, component = torch.arange(BLOCK_TOKENS), torch.arange(QUAD)[:, None]
    half, h, c, b = token // 16, token // 8 % 2, token // 2 % 4, token % 2
    j, odd = component // 2, component & 1
    if bits == 16:
        return 16 * ((2 * j + half) ^ (quad & 1)) + 4 * c + odd + 2 * h, 16 * b
    if bits == 4:
        return 4 * c + 2 * half + j, 8 * (2 * h + b) + 4 * odd
    if bits == 2:
        return 2 * c + half, 8 * (2 * h + b) + 2 * component
    return c, 8 * (2 * h + b) + 4 * half + component


_PLACES = {"key": _key_places, "value": _value_places}


class Tiles:
    """Packs and unpacks one site's codes in the tile layout; the gains that follow them in a row are not its business.

    part: whose layout it is. n_bytes: of a row without gains. number_places: [n], which pairs of its bytes hold
    components of 16 bits. quads: int32 [R / 4 + R8 / 4, 2], first word and index of each, as quad_places orders them.
    """

    def __init__(self, part: Part, bits: Tensor, block: Tensor, device: torch.device) -> None:
        """bits, block: [R]. Raises ValueError where components do not come in quads."""
        places = tile_places(part, bits.cpu(), block.cpu())
        if places is None:
            raise ValueError("components that do not come in quads have no tile layout")
        self.part: Part = part
        self.quads = torch.stack(quad_places(bits.cpu(), block.cpu())[1:], 1).to(device, torch.int32)
        self.n_bytes = int(bits.sum()) * BLOCK_TOKENS // 8
        self._classes = runs(bits.tolist())

        def fields(bits: int, rows: slice) -> tuple[Tensor, Tensor]:
            """Return the byte of each code, token after token, and the bit in it; of 16 bits the pair of bytes."""
            word, shift = (x[rows].T.flatten() for x in places)
            unit = max(8, bits)
            return (word * (32 // unit) + shift // unit).to(device), (shift % unit).to(torch.uint8).to(device)

        self._fields = [fields(b, slice(first, last)) for b, first, last in self._classes]
        self._low = fields(4, slice(len(bits), None))
        self.number_places = self._fields[0][0] if 16 in bits else torch.zeros(0, dtype=torch.long, device=device)

    def pack(self, codes: Tensor) -> Tensor:
        """codes: [batch, n_blocks * 32, R], of 16 bits the numbers themselves -> uint8 [batch, n_blocks, n_bytes]."""
        blocks = codes.unflatten(1, (-1, BLOCK_TOKENS))
        packed = torch.zeros(*blocks.shape[:2], self.n_bytes, dtype=torch.uint8, device=codes.device)

        def add(codes: Tensor, byte: Tensor, shift: Tensor) -> None:
            packed.scatter_add_(-1, byte.expand_as(codes), codes << shift)

        for (bits, first, last), (place, shift) in zip(self._classes, self._fields, strict=True):
            own = blocks[..., first:last].flatten(2)
            if bits == 16:
                packed.view(torch.float16).scatter_(-1, place.expand_as(own), own.half())
            elif bits == 8:
                add(own.to(torch.uint8) >> 4, place, shift)
                add(own.to(torch.uint8) & 15, *self._low)
            else:
                add(own.to(torch.uint8), place, shift)
        return packed

    def unpack(self, packed: Tensor, into: Tensor) -> None:
        """Write the codes in packed rows [batch, n_blocks, >= n_bytes] into [batch, n_blocks * 32, R], float32."""
        blocks = into.unflatten(1, (-1, BLOCK_TOKENS))

        def gathered(source: Tensor, place: Tensor) -> Tensor:
            return source.gather(-1, place.expand(*source.shape[:2], -1))

        for (bits, first, last), (place, shift) in zip(self._classes, self._fields, strict=True):
            if bits == 16:
                codes = gathered(packed.view(torch.float16), place)
            elif bits == 8:
                low, low_shift = self._low
                codes = (((gathered(packed, place) >> shift) & 15) << 4) + ((gathered(packed, low) >> low_shift) & 15)
            else:
                codes = (gathered(packed, place) >> shift) & ((1 << bits) - 1)
            blocks[..., first:last] = codes.unflatten(2, (BLOCK_TOKENS, -1))
