"""A codec as the kernels take it: its maps in their layouts, and the packing of tokens by kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.kernels.group_layout import GroupLayout, decoder_fragments, group_layout, head_decoders, largest_rows
from kvcompress.kernels.layout import LEVELS, PackedSite, row_words
from kvcompress.kernels.rebuild import RebuildMaps, rebuild_maps
from kvcompress.kernels.turned import GroupedSite
from kvcompress.model.rope import Rotary
from kvcompress.plan import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class DenseMaps:
    """A codec's maps as whole matrices, rows in packed order, steps folded in: [R, n] float16."""

    encoder: Tensor
    decoder: Tensor
    counts: dict[int, int]


@dataclass(frozen=True, slots=True)
class GroupedMaps:
    """A tiled codec's layout, maps and mean as the kernels for turns take them; see turned.GroupedSite."""

    layout: GroupLayout
    maps: Tensor
    mean: Tensor | None
    largest_rows: Tensor | None


_left_out: ContextVar[bool] = ContextVar("kvcompress_left_out", default=False)


def kernels_apply(device: torch.device) -> bool:
    """Return whether tensors on this device are worked on by the kernels."""
    return device.type == "cuda" and _has_triton() and not _left_out.get()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block, in this thread, the reference does what kernels would; none is compiled for a plan's levels."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class SiteKernels:
    """What the kernels need of one codec, made at its first use and kept with it."""

    def __init__(self, codec: SiteCodec, n_kv_heads: int) -> None:
        self.codec, self.n_kv_heads = codec, n_kv_heads

    @property
    def packable(self) -> bool:
        """Whether the kernels know all levels of bits of the codec."""
        classes = self.codec.classes
        return bool(classes) and all(bits in LEVELS for bits, *_ in classes)

    @cached_property
    def dense(self) -> DenseMaps:
        codec = self.codec
        device = codec.encoder.device
        width = codec.encoder.shape[0] * codec.encoder.shape[2]
        encoder = codec.project(torch.eye(width, device=device)).T.contiguous()
        decoder = codec.decode(torch.eye(codec.n_components, device=device))
        counts = {bits: stop - start for bits, start, stop in codec.classes}
        return DenseMaps(encoder.half(), decoder.half(), counts)

    @cached_property
    def rebuilt(self) -> RebuildMaps:
        """What turns packed rows back into numbers."""
        return rebuild_maps(self.codec, self.dense.decoder)

    @cached_property
    def grouped(self) -> GroupedMaps | None:
        """What the kernels for turns need, or None where the codec's rows are not tiled."""
        codec = self.codec
        bits = [b for b, first, last in codec.classes for _ in range(last - first)]
        n_groups = codec.encoder.shape[0]
        layout = group_layout(bits, codec.block, n_groups) if codec.tiles is not None else None
        if layout is None or codec.tiles is None or self.n_kv_heads % n_groups:
            return None
        maps = head_decoders(self.dense.decoder, layout, self.n_kv_heads)
        largest = None
        if codec.tiles.part == "key":
            largest = largest_rows(maps, layout)
            maps = decoder_fragments(maps, layout.sets[0])
        # A part of a file's memory might lie anywhere: kernels read 16 bytes at a time.
        mean = None if codec.mean is None else codec.mean.clone()
        return GroupedMaps(replace(layout, table=layout.table.to(maps.device)), maps, mean, largest)

    def pack(self, x: Tensor) -> Tensor | None:
        """Return what codec.pack returns, or None; x: [batch, n_blocks * 32, n], the mean already subtracted."""
        if not kernels_apply(x.device) or not self.packable:
            return None
        from kvcompress.kernels.encode import project

        return self._packed(project(x, self.dense.encoder))

    def pack_heads(self, x: Tensor, rotary: Rotary | None, positions: Tensor | None) -> Tensor | None:
        """Return what codec.pack returns of x un-rotated and without the mean, or None.

        x: [batch, heads, n_blocks * 32, head_dim]; rotary: None where nothing is to be un-rotated; positions: those
        that keys are rotated by, [batch, n_blocks * 32].
        """
        whole = rotary is None or whole_rotation(rotary, x.shape[3])
        if not (whole and kernels_apply(x.device) and self.packable):
            return None
        from kvcompress.kernels.encode import centred, project

        return self._packed(project(centred(x, self.codec.mean, rotary, positions), self.dense.encoder))

    def pack_pages(
        self, source: Tensor, words: Tensor, sources: Tensor, destinations: Tensor, rotary: Rotary | None,
        positions: Tensor,
    ) -> None:  # fmt: skip
        """Encode blocks of 32 tokens from pages into pages; nothing depends on values, so that a CUDA graph records it.

        source: [pages, 32, heads, head_dim], after RoPE; words: int32 [pages, blocks of a page, words of a row], of
        page_views.page_words; sources, destinations: int32 [n_blocks], each block's page of `source` and its row of all
        rows of `words`, counted through the pages, both -1 where there is nothing to do; rotary: None of values and
        where nothing is to be un-rotated; positions: those that keys are rotated by, [1, n_blocks * 32].
        """
        self.write_pages(self.page_latents(source, sources, rotary, positions), words, destinations)

    def page_latents(self, source: Tensor, sources: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
        """Return the latents of blocks in pages, [1, n_blocks * 32, R]; arguments: those of pack_pages."""
        from kvcompress.kernels.encode import centred_pages, project

        return project(centred_pages(source, sources, self.codec.mean, rotary, positions), self.dense.encoder)

    def write_pages(self, latents: Tensor, words: Tensor, destinations: Tensor, gains: Tensor | None = None) -> None:
        """Write the codes of page_latents; gains: their codes, uint8 [n_blocks * 32], chosen here if None."""
        from kvcompress.kernels.encode import pack_latents

        pack_latents(latents, self.site(words), tiles=self.codec.tiles, destinations=destinations, gains=gains)

    def gain_errors(self, latents: Tensor, words: Tensor) -> Tensor:
        """Return SiteCodec.gain_errors of latents [batch, n_tokens, R]: float32 [batch, n_tokens, 16]; words: rows."""
        from kvcompress.kernels.encode import gain_errors

        return gain_errors(latents, self.site(words))

    def site(self, packed: Tensor, *, mean: Tensor | None = None) -> PackedSite:
        """packed: int32 [batch, n_blocks, words of a row]."""
        dense = self.dense
        return PackedSite(packed, dense.counts, dense.decoder, mean, self.codec.has_gain)

    def grouped_site(self, maps: GroupedMaps, packed: Tensor) -> GroupedSite:
        """packed: uint8 [batch, n_blocks, bytes of a row]; maps: what `grouped` returned."""
        codec = self.codec
        gain_word = sum(bits * (last - first) for bits, first, last in codec.classes) if codec.has_gain else None
        return GroupedSite(packed.view(torch.int32), maps.layout, maps.maps, maps.mean, gain_word, maps.largest_rows)

    def _packed(self, latents: Tensor) -> Tensor:
        from kvcompress.kernels.encode import pack_latents

        row = row_words(self.dense.counts, has_gain=self.codec.has_gain)
        batch, n_tokens, _ = latents.shape
        words = torch.empty(batch, n_tokens // BLOCK_TOKENS, row, dtype=torch.int32, device=latents.device)
        gains = None
        if self.codec.sum_over_ranks is not None:
            gains = self.codec.gains_by(self.gain_errors(latents, words))
        pack_latents(latents, self.site(words), tiles=self.codec.tiles, gains=gains)
        return words.view(torch.uint8)


def whole_rotation(rotary: Rotary | None, head_dim: int) -> bool:
    """Return whether RoPE turns every channel of a head, in the half-split pairs that the kernels know."""
    return rotary is not None and rotary.turns_all(head_dim)
