"""The tile layout, pinned: where single codes lie in a row, worked out by hand from docs/format.md."""

from __future__ import annotations

import pytest
import torch

from kvcompress.codec.tiles import Tiles
from kvcompress.model.model_spec import Part

#: Components of two groups: of 16 bits 8 and 0, of 8 bits 4 and 0, of 4 bits 8 and 4, of 2 bits 4 and 0, of 1 bit 4
#: and 12.
BITS = [16] * 8 + [8] * 4 + [4] * 12 + [2] * 4 + [1] * 16
GROUP = [0] * 20 + [1] * 4 + [0] * 8 + [1] * 12
#: So numbers begin at word 0, nibbles at 128 (high), 144 (low), 160 and 176 (4 bits), 2 bits at 192, 1 bit at 200; of
#: the second group nibbles at 204, 1 bit at 220; and a row has 232 words.
#: (component, token, code or number, {word: what it is then})
CASES: dict[Part, list[tuple[int, int, float, dict[int, int]]]] = {
    "key": [
        (0, 0, 1.0, {0: 0x3C00}),
        (3, 29, 1.0, {63: 0x3C000000}),
        (6, 29, -2.0, {111: 0xC000}),
        (9, 13, 0xA7, {138: 0xA << 12, 154: 0x7 << 12}),
        (12, 13, 0xB, {162: 0xB << 4}),
        (19, 31, 9, {183: 9 << 28}),
        (22, 16, 15, {205: 15 << 16}),
        (25, 27, 2, {195: 2 << 14}),
        (29, 20, 1, {202: 1 << 9}),
        (43, 31, 1, {231: 1 << 31}),
    ],
    "value": [
        (2, 13, 1.0, {42: 0x3C000000}),
        (7, 22, -2.0, {109: 0xC000}),
        (9, 13, 0xA7, {136: 0xA << 28, 152: 0x7 << 28}),
        (12, 13, 0xB, {168: 0xB << 24}),
        (19, 31, 9, {191: 9 << 28}),
        (22, 16, 15, {207: 15}),
        (25, 27, 2, {195: 2 << 26}),
        (29, 20, 1, {202: 1 << 5}),
        (43, 31, 1, {231: 1 << 31}),
    ],
}


@pytest.mark.parametrize("part", CASES)
def test_codes_lie_where_the_format_says(part: Part) -> None:
    tiles = Tiles(part, torch.tensor(BITS), torch.tensor(GROUP), torch.device("cpu"))
    together = torch.zeros(1, 32, len(BITS))
    everywhere = torch.zeros(232, dtype=torch.long)
    for component, token, code, words in CASES[part]:
        alone = torch.zeros(1, 32, len(BITS))
        alone[0, token, component] = together[0, token, component] = code
        expected = torch.zeros(232, dtype=torch.long)
        for word, value in words.items():
            expected[word] = value
        everywhere += expected
        packed = tiles.pack(alone)
        assert packed.shape == (1, 1, 4 * 232)
        assert torch.equal(packed.view(torch.int32)[0, 0].long() & 0xFFFFFFFF, expected)
    packed = tiles.pack(together)
    assert torch.equal(packed.view(torch.int32)[0, 0].long() & 0xFFFFFFFF, everywhere)
    back = torch.full_like(together, torch.nan)
    tiles.unpack(packed, back)
    assert torch.equal(back, together)
