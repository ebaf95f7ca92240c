"""Encoding a few blocks of every layer at once, as a generation's step completes them: recorded, layers side by side.

Launches for one block of 32 tokens do next to nothing, and yet a layer's eight take 70 us. A CUDA graph starts them
without Python, and several layers' at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.rope import Rotary

#: Branches of the graph.
_STREAMS = 16


@dataclass(frozen=True, slots=True)
class EncodedSite:
    """One site's pages, see SiteKernels.pack_pages. rotary: None of values and where nothing is to be un-rotated."""

    kernels: SiteKernels
    source: Tensor
    words: Tensor
    rotary: Rotary | None

    def encode(self, sources: Tensor, destinations: Tensor, positions: Tensor) -> None:
        self.kernels.pack_pages(self.source, self.words, sources, destinations, self.rotary, positions)


@dataclass(frozen=True, slots=True)
class EncodedRotatedKeys:
    """Pages of keys that are encoded after RoPE, whose mean turns with the position: that is taken off in torch.

    source, words: as of EncodedSite.
    """

    codecs: LayerKernels
    source: Tensor
    words: Tensor

    def encode(self, sources: Tensor, destinations: Tensor, positions: Tensor) -> None:
        from kvcompress.kernels.encode import pack_latents, project

        site = self.codecs.key_site
        assert site is not None, "keys that are kept whole are not encoded"
        keys = self.source[sources.clamp_min(0).long()].flatten(0, 1).transpose(0, 1)
        latents = project(self.codecs.centred_keys(keys[None], positions), site.dense.encoder)
        pack_latents(latents, site.site(self.words), tiles=site.codec.tiles, destinations=destinations)


@dataclass(slots=True)
class _Lists:
    """What a recorded graph reads: -1 where there is nothing to do."""

    sources: Tensor
    destinations: Tensor
    positions: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class RecordedEncoding:
    """Encodes the same blocks at all sites. Graphs are recorded at first use, one for each power of two of blocks.

    sites: all of one model; their pages must stay where they are.
    """

    def __init__(self, sites: Sequence[EncodedSite | EncodedRotatedKeys], *, n_streams: int = _STREAMS) -> None:
        self._sites, self._lists = list(sites), dict[int, _Lists]()
        self._device = self._sites[0].source.device
        recorded = self._device.type == "cuda"
        self._streams = [torch.cuda.Stream(self._device) for _ in range(n_streams)] if recorded else []

    def encode(self, sources: Tensor, destinations: Tensor, positions: Tensor) -> None:
        """Encode blocks: int32 [n_blocks], [n_blocks] and [n_blocks * 32], as SiteKernels.pack_pages takes them."""
        n_blocks = len(sources)
        if n_blocks == 0:
            return
        if len(destinations) != n_blocks or positions.numel() != n_blocks * BLOCK_TOKENS:
            raise OptionError(
                f"{n_blocks} blocks to encode have {len(destinations)} destinations and {positions.numel()} positions. "
                f"Expected {n_blocks} and {n_blocks * BLOCK_TOKENS}."
            )
        size = 1 << (n_blocks - 1).bit_length()
        lists = self._lists.get(size)
        if lists is None:
            lists = self._lists[size] = self._new_lists(size)
        lists.sources[:n_blocks], lists.destinations[:n_blocks] = sources, destinations
        lists.sources[n_blocks:], lists.destinations[n_blocks:] = -1, -1
        lists.positions[0, : n_blocks * BLOCK_TOKENS] = positions.flatten()
        if lists.graph is not None:
            lists.graph.replay()
            return
        self._encode(lists)  # compiles what is not compiled yet, too
        if self._streams:
            lists.graph = self._recorded(lists)

    def _new_lists(self, size: int) -> _Lists:
        empty, tokens = (torch.full((n,), -1, dtype=torch.int32, device=self._device) for n in (size, size))
        positions = torch.zeros(1, size * BLOCK_TOKENS, dtype=torch.int32, device=self._device)
        return _Lists(empty, tokens, positions)

    def _encode(self, lists: _Lists) -> None:
        for site in self._sites:
            site.encode(lists.sources, lists.destinations, lists.positions)

    def _recorded(self, lists: _Lists) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            main = torch.cuda.current_stream(self._device)
            for stream in self._streams:
                stream.wait_stream(main)
            for i, site in enumerate(self._sites):
                with torch.cuda.stream(self._streams[i % len(self._streams)]):
                    site.encode(lists.sources, lists.destinations, lists.positions)
            for stream in self._streams:
                main.wait_stream(stream)
        return graph
