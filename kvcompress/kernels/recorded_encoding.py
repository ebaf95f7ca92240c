"""Encoding a few blocks of every layer at once, as a generation's step completes them: recorded, layers side by side.

Launches for one block of 32 tokens do next to nothing, and yet a layer's eight take 70 us. A CUDA graph starts them
without Python, and several layers' at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codec.quantise import least_gain
from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.kernels.site import SiteKernels
from kvcompress.model.replay import record
from kvcompress.model.rope import Rotary

#: Branches of the graph.
_STREAMS = 16
#: Blocks that ranks choose gains of at once: their latents at all sites are kept meanwhile.
_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class EncodedSite:
    """One site's pages, see SiteKernels.pack_pages. rotary: None of values and where nothing is to be un-rotated."""

    kernels: SiteKernels
    source: Tensor
    words: Tensor
    rotary: Rotary | None

    def latents(self, sources: Tensor, positions: Tensor) -> Tensor:
        """Return what is written of blocks, [1, n_blocks * 32, R]."""
        return self.kernels.page_latents(self.source, sources, self.rotary, positions)


@dataclass(frozen=True, slots=True)
class EncodedRotatedKeys:
    """Pages of keys that are encoded after RoPE, whose mean turns with the position: that is taken off in torch.

    source, words: as of EncodedSite.
    """

    codecs: LayerKernels
    source: Tensor
    words: Tensor

    @property
    def kernels(self) -> SiteKernels:
        site = self.codecs.key_site
        assert site is not None, "keys that are kept whole are not encoded"
        return site

    def latents(self, sources: Tensor, positions: Tensor) -> Tensor:
        from kvcompress.kernels.encode import project

        keys = self.source[sources.clamp_min(0).long()].flatten(0, 1).transpose(0, 1)
        return project(self.codecs.centred_keys(keys[None], positions), self.kernels.dense.encoder)


@dataclass(slots=True)
class _Lists:
    """What recorded graphs read: -1 where there is nothing to do. graphs: what replays each phase, by its name.

    Where ranks choose gains together: latents of each site, their errors, float32 [sites, n_tokens, 16], and the gains,
    uint8 [sites, n_tokens].
    """

    sources: Tensor
    destinations: Tensor
    positions: Tensor
    latents: list[Tensor] = field(default_factory=list)
    errors: Tensor | None = None
    gains: Tensor | None = None
    graphs: dict[str, Callable[[], None]] = field(default_factory=dict)


class RecordedEncoding:
    """Encodes the same blocks at all sites. Graphs are recorded at first use, one for each power of two of blocks.

    sites: all of one model; their pages must stay where they are. Where ranks share a model's heads, one sum over them
    for all sites chooses the gains: it lies between two graphs, of what comes before it and after.
    """

    def __init__(self, sites: Sequence[EncodedSite | EncodedRotatedKeys], *, n_streams: int = _STREAMS) -> None:
        self._sites, self._lists = list(sites), dict[int, _Lists]()
        self._device = self._sites[0].source.device
        recorded = self._device.type == "cuda"
        self._streams = [torch.cuda.Stream(self._device) for _ in range(n_streams)] if recorded else []
        sums = (site.kernels.codec.sum_over_ranks for site in self._sites)
        self._sum_over_ranks = next((sum_over_ranks for sum_over_ranks in sums if sum_over_ranks is not None), None)

    def encode(self, sources: Tensor, destinations: Tensor, positions: Tensor) -> None:
        """Encode blocks: int32 [n_blocks], [n_blocks] and [n_blocks * 32], as SiteKernels.pack_pages takes them."""
        n_blocks = len(sources)
        if len(destinations) != n_blocks or positions.numel() != n_blocks * BLOCK_TOKENS:
            raise OptionError(
                f"{n_blocks} blocks to encode have {len(destinations)} destinations and {positions.numel()} positions. "
                f"Expected {n_blocks} and {n_blocks * BLOCK_TOKENS}."
            )
        at_once = n_blocks if self._sum_over_ranks is None else _TOGETHER
        for first in range(0, n_blocks, max(1, at_once)):
            own, tokens = (slice(n * first, n * (first + at_once)) for n in (1, BLOCK_TOKENS))
            self._encode(self._filled(sources[own], destinations[own], positions.flatten()[tokens]))

    def _encode(self, lists: _Lists) -> None:
        if self._sum_over_ranks is None:
            self._run(self._encode_site, lists)
            return
        assert lists.errors is not None and lists.gains is not None
        self._run(self._measure_site, lists)
        lists.gains.copy_(least_gain(self._sum_over_ranks(lists.errors)))
        self._run(self._write_site, lists)

    def _encode_site(self, lists: _Lists, i: int) -> None:
        site = self._sites[i]
        site.kernels.write_pages(site.latents(lists.sources, lists.positions), site.words, lists.destinations)

    def _measure_site(self, lists: _Lists, i: int) -> None:
        assert lists.errors is not None
        site = self._sites[i]
        lists.latents[i].copy_(site.latents(lists.sources, lists.positions))
        lists.errors[i] = site.kernels.gain_errors(lists.latents[i], site.words)[0]

    def _write_site(self, lists: _Lists, i: int) -> None:
        assert lists.gains is not None
        site = self._sites[i]
        gains = lists.gains[i] if site.kernels.codec.has_gain else None
        site.kernels.write_pages(lists.latents[i], site.words, lists.destinations, gains)

    def _filled(self, sources: Tensor, destinations: Tensor, positions: Tensor) -> _Lists:
        n_blocks = len(sources)
        size = 1 << (n_blocks - 1).bit_length()
        lists = self._lists.get(size)
        if lists is None:
            lists = self._lists[size] = self._new_lists(size)
        lists.sources[:n_blocks], lists.destinations[:n_blocks] = sources, destinations
        lists.sources[n_blocks:], lists.destinations[n_blocks:] = -1, -1
        lists.positions[0, : n_blocks * BLOCK_TOKENS] = positions
        return lists

    def _new_lists(self, size: int) -> _Lists:
        empty, tokens = (torch.full((n,), -1, dtype=torch.int32, device=self._device) for n in (size, size))
        positions = torch.zeros(1, size * BLOCK_TOKENS, dtype=torch.int32, device=self._device)
        lists = _Lists(empty, tokens, positions)
        if self._sum_over_ranks is not None:
            n_tokens, device = size * BLOCK_TOKENS, self._device
            encoders = [site.kernels.dense.encoder for site in self._sites]
            lists.latents = [torch.empty(1, n_tokens, len(e), dtype=e.dtype, device=device) for e in encoders]
            lists.errors = torch.zeros(len(encoders), n_tokens, 16, device=device)
            lists.gains = torch.zeros(len(encoders), n_tokens, dtype=torch.uint8, device=device)
        return lists

    def _run(self, phase: Callable[[_Lists, int], None], lists: _Lists) -> None:
        """Do a phase of all sites: recorded, but for its first time, which compiles what is not compiled yet, too."""
        replay = lists.graphs.get(phase.__name__)
        if replay is not None:
            replay()
            return
        for i in range(len(self._sites)):
            phase(lists, i)
        if self._streams:
            lists.graphs[phase.__name__] = self._recorded(phase, lists)

    def _recorded(self, phase: Callable[[_Lists, int], None], lists: _Lists) -> Callable[[], None]:
        def all_sites() -> None:
            main = torch.cuda.current_stream(self._device)
            for stream in self._streams:
                stream.wait_stream(main)
            for i in range(len(self._sites)):
                with torch.cuda.stream(self._streams[i % len(self._streams)]):
                    phase(lists, i)
            for stream in self._streams:
                main.wait_stream(stream)

        replay, _ = record(all_sites, self._device)
        return replay
