"""The tile layout: every bit of a row has one owner, what is packed is read back, layers have it where they can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import SiteCodec, layer_codecs
from kvcompress.codec.tiles import Tiles, is_tileable, tile_places
from kvcompress.model.model_spec import PARTS, Part

CPU = torch.device("cpu")
#: Components of each group by bits.
COUNTS: dict[str, dict[int, list[int]]] = {
    "all classes": {16: [4, 12], 8: [8, 4], 4: [16, 4], 2: [4, 20], 1: [24, 8]},
    "classes that a group lacks": {8: [0, 8, 4], 4: [12, 0, 0], 1: [0, 0, 16]},
    "numbers alone": {16: [20]},
    "codes alone": {8: [4], 2: [36]},
}


def components(counts: dict[int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits and groups in the order of a maps file."""
    each = [(b, g) for b in sorted(counts, reverse=True) for g, n in enumerate(counts[b]) for _ in range(n)]
    bits, group = zip(*each, strict=True)
    return torch.tensor(bits, dtype=torch.uint8), torch.tensor(group, dtype=torch.int32)


def random_maps(counts: dict[int, list[int]], *, width: int = 16) -> SiteMaps:
    torch.manual_seed(0)
    bits, group = components(counts)
    n_groups = len(next(iter(counts.values())))
    blocks = torch.arange(n_groups * width, dtype=torch.int32).view(n_groups, width)
    step = torch.where(bits < 16, 2.0 ** (2 - bits.float()), torch.ones(()))
    maps = torch.randn(len(bits), width).half()
    return SiteMaps(blocks, maps, maps / 8, group, bits, step, torch.randn(blocks.numel()))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", COUNTS)
def test_every_bit_of_a_row_belongs_to_one_code(part: Part, name: str) -> None:
    bits, group = components(COUNTS[name])
    places = tile_places(part, bits, group)
    assert places is not None
    word, shift = places
    n_low = int((bits == 8).sum())
    stored = torch.cat([bits.where(bits != 8, 4), torch.full((n_low,), 4)])  # a component of 8 bits is two nibbles
    assert word.shape == shift.shape == (len(bits) + n_low, 32)
    owners = torch.zeros(32 * int(bits.sum()), dtype=torch.long)
    for n, of_code in zip(stored.tolist(), 32 * word + shift, strict=True):
        for bit in range(n):
            owners[of_code + bit] += 1
    assert (owners == 1).all()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", COUNTS)
def test_groups_and_classes_begin_at_multiples_of_16_bytes(part: Part, name: str) -> None:
    """And lie in the order of the format: groups, in each of them numbers, nibbles, pairs of bits, bits."""
    bits, group = components(COUNTS[name])
    word, _ = tile_places(part, bits, group)  # type: ignore[misc]
    starts = []
    for g in range(len(next(iter(COUNTS[name].values())))):
        for b in (16, 8, 4, 2, 1):
            own = word[: len(bits)][(group == g) & (bits == b)]
            starts += [int(own.min())] if len(own) else []
    assert starts == sorted(set(starts)) and starts[0] == 0 and all(start % 4 == 0 for start in starts)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", COUNTS)
def test_a_codec_reads_the_same_from_either_layout(part: Part, name: str) -> None:
    maps = random_maps(COUNTS[name])
    plain, tiled = SiteCodec(maps, CPU), SiteCodec(maps, CPU, tiled_for=part)
    x = torch.randn(3, 160, maps.blocks.numel()) * torch.logspace(-1, 1, 160)[:, None]  # gains of many sizes
    ours, theirs = tiled.pack(x), plain.pack(x)
    assert ours.shape == theirs.shape and ours.dtype == torch.uint8 and not torch.equal(ours, theirs)
    assert torch.equal(tiled.unpack(ours), plain.unpack(theirs))
    assert torch.equal(tiled.unpack(ours[1:, 2:4]), plain.unpack(theirs[1:, 2:4]))  # a view, as attention takes it
    if plain.has_gain:
        assert torch.equal(ours[..., -16:], theirs[..., -16:])


@pytest.mark.parametrize(
    ("bits", "block", "tileable"),
    [
        ([8] * 4 + [4] * 8, [0] * 4 + [0] * 4 + [1] * 4, True),
        ([8] * 4 + [4] * 6, [0] * 10, False),
        ([4] * 8, [0] * 6 + [1] * 2, False),
        ([8] * 2 + [4] * 2, [0] * 4, False),
        ([32] * 4, [0] * 4, False),
        ([4] * 3, [0] * 3, False),
        ([], [], True),
    ],
)
def test_components_that_come_in_quads_are_tileable(bits: list[int], block: list[int], tileable: bool) -> None:
    components = torch.tensor(bits, dtype=torch.uint8), torch.tensor(block, dtype=torch.int32)
    assert is_tileable(*components) == tileable
    for part in PARTS:
        assert (tile_places(part, *components) is not None) == tileable
    if not tileable:
        with pytest.raises(ValueError, match="quads"):
            Tiles("key", *components, CPU)


def test_a_layer_has_tiles_where_both_of_its_sites_can() -> None:
    maps, odd = random_maps({4: [8, 4]}), random_maps({4: [7, 5]})
    turned = layer_codecs(maps, maps, CPU, turn=256)
    assert [c.tiles.part for c in turned if c and c.tiles] == ["key", "value"]
    interleaved = replace(maps, blocks=maps.blocks.T.reshape(2, 16))
    for key, value, turn in (
        (maps, maps, 1),
        (maps, maps, 64),
        (maps, odd, 128),
        (odd, maps, 128),
        (interleaved, maps, 128),
        (maps, None, 128),
    ):
        codecs = layer_codecs(key, value, CPU, turn=turn)
        assert [c is None for c in codecs] == [key is None, value is None]
        assert all(c is None or c.tiles is None for c in codecs)
