"""Packed pages back to keys and values, for queries that are so many that tensor cores should score exact keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.codec.tiles import tile_places
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.model.rope import Rotary

_WIDTH = 64
_BLOCKS = 4
_TOKENS = 16
#: Columns of a group are filled up to a multiple, so that the rows of its products are aligned.
_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class RebuildMaps:
    """Where each code of a row lies, what it stands for, and what it is decoded with, for each group of heads.

    places: int32 [groups, 32 tokens, columns], 32 * word + lowest bit. levels: float32 [groups, 3, columns], the
    largest code, what it is multiplied by, and what is taken off. decoder: float16 [groups, columns, n / groups].
    Components of 8 bits that a row holds in two halves have two columns, and columns without any stand for 0.
    gain_word: where the gains begin, None without any.
    """

    places: Tensor
    levels: Tensor
    decoder: Tensor
    gain_word: int | None


def rebuild_maps(codec: SiteCodec, decoder: Tensor) -> RebuildMaps:
    """Return the maps of a codec whose components have 16 bits or fewer. decoder: its own, dense, float16 [R, n]."""
    bits = torch.tensor([b for b, first, last in codec.classes for _ in range(last - first)])
    places, levels, rows = _columns(codec, bits)
    # Groups of neighbouring heads are decoded each by itself; other blocks, all at once.
    n_groups = codec.encoder.shape[0] if codec.tiles is not None else 1
    group = torch.tensor(codec.block)[rows] if n_groups > 1 else torch.zeros(len(rows), dtype=torch.long)
    most = -(-int(torch.bincount(group, minlength=n_groups).max()) // _COLUMNS) * _COLUMNS
    width = decoder.shape[1] // n_groups
    all_places = torch.zeros(n_groups, BLOCK_TOKENS, most, dtype=torch.int32)
    all_levels, all_rows = torch.zeros(n_groups, 3, most), torch.zeros(n_groups, most, width, dtype=torch.float16)
    for g in range(n_groups):
        own = (group == g).nonzero()[:, 0]
        all_places[g, :, : len(own)] = places[own].T
        all_levels[g, :, : len(own)] = levels[own].T
        all_rows[g, : len(own)] = decoder[rows[own].to(decoder.device), g * width : (g + 1) * width].cpu()
    gain_word = int(bits.sum()) if codec.has_gain else None
    device = decoder.device
    return RebuildMaps(all_places.to(device), all_levels.to(device), all_rows.to(device), gain_word)


def _columns(codec: SiteCodec, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each column its places [32], its levels [3], and its component."""
    offsets = torch.where(bits < 16, 2.0 ** (bits.float() - 1) - 0.5, 0.0)
    if codec.tiles is None:
        start = (BLOCK_TOKENS * bits).cumsum(0) - BLOCK_TOKENS * bits
        places = start[:, None] + bits[:, None] * torch.arange(BLOCK_TOKENS)
        return (
            places,
            torch.stack([2.0 ** bits.float() - 1, torch.ones(len(bits)), offsets], 1),
            torch.arange(len(bits)),
        )
    halved = (bits == 8).nonzero()[:, 0]
    found = tile_places(codec.tiles.part, bits, torch.tensor(codec.block))
    assert found is not None  # the codec has tiles
    word, shift = found
    rows = torch.cat([torch.arange(len(bits)), halved])
    sizes = torch.cat([torch.where(bits == 8, 16.0, 1.0), torch.ones(len(halved))])
    offset = torch.cat([offsets, torch.zeros(len(halved))])
    level = torch.where(bits[rows] == 8, 4, bits[rows])
    return 32 * word + shift, torch.stack([2.0 ** level.float() - 1, sizes, offset], 1), rows


@dataclass(frozen=True, slots=True)
class Rotation:
    """How rebuilt keys are rotated. turn: tokens rotated by one position; mean_only: they were encoded after RoPE, and
    their mean alone turns."""

    rotary: Rotary
    turn: int = 1
    mean_only: bool = False


def rebuild(
    maps: RebuildMaps, words: Tensor, pages: Tensor, out: Tensor, *, first_block: int, mean: Tensor | None,
    rotation: Rotation | None,
) -> None:  # fmt: skip
    """Write a sequence's packed tokens, from block first_block on, into `out` [n_blocks * 32, heads, head_dim].

    words: of page_views.page_words; pages: int32, the sequence's; rotation: None where nothing is to be rotated.
    """
    from kvcompress.kernels.rebuilding import heads_kernel, latents_kernel

    n_tokens, n_heads, head_dim = out.shape
    n_blocks = n_tokens // BLOCK_TOKENS
    n_groups, _, n_columns = maps.places.shape
    z = torch.empty(n_groups, n_tokens, n_columns, dtype=torch.float16, device=out.device)
    latents_kernel[(-(-n_blocks // _BLOCKS), -(-n_columns // _WIDTH), n_groups)](
        words, pages, maps.places, maps.levels, z, first_block, n_blocks, n_columns, maps.gain_word or 0,
        words.stride(0), words.stride(1), PAGE_BLOCKS=words.shape[1], BLOCKS=_BLOCKS, WIDTH=_WIDTH,
        HAS_GAIN=maps.gain_word is not None,
    )  # fmt: skip
    x = z @ maps.decoder
    frequencies, scale, turn, mean_only = x, 1.0, 1, False
    if rotation is not None:
        rotary, turn, mean_only = rotation.rotary, rotation.turn, rotation.mean_only
        frequencies, scale = rotary.inv_freq.to(out.device), rotary.scale
    heads_kernel[(-(-n_tokens // _TOKENS), n_heads)](
        x, x if mean is None else mean, frequencies, out, first_block * BLOCK_TOKENS, turn, n_tokens, x.stride(0),
        x.stride(1), out.stride(0), out.stride(1), scale, HEAD_DIM=head_dim,
        WIDTH=1 << (head_dim // 2 - 1).bit_length(), TOKENS=_TOKENS, ROTATED=rotation is not None, MEAN_ONLY=mean_only,
        HAS_MEAN=mean is not None, GROUP_HEADS=n_heads // n_groups, ONE_TURN=turn % _TOKENS == 0,
    )  # fmt: skip
