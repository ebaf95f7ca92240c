"""The kernels in the engine: what they need of a model's layers and of a step, at addresses that a CUDA graph can
record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.chunk import Attend, Context, RebuiltLayer, Tiles, chunk_attention
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.packing_ahead import compile_packing
from kvcompress.kernels.page_views import ExactPages, QueryTokens
from kvcompress.kernels.paged import PagedLayer, paged_attention, workspace_for
from kvcompress.kernels.paged_layer import (
    paged_layer,
    rebuilt_layer,
    rotated_layer,
    why_not_paged,
    why_not_rebuilt,
    why_not_rotated,
)
from kvcompress.kernels.paged_rotated import ExactPlaces, RotatedLayer, rotated_attention
from kvcompress.kernels.paged_step import StepTokens, begin_step
from kvcompress.kernels.paged_workspace import Workspace
from kvcompress.kernels.recorded_encoding import EncodedRotatedKeys, EncodedSite, RecordedEncoding
from kvcompress.kernels.rotated_ahead import compile_rotated
from kvcompress.model.model_spec import Part
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.pages import exact_parts
from kvcompress.vllm.reference import LayerCache, Row, encode_chunk
from kvcompress.vllm.steps import Step

#: Blocks whose encoding is recorded before the first request: those of up to eight sequences, little memory.
_RECORDED_AHEAD = (2, 4, 8, 16)


def why_not_fused(codecs: LayerKernels, sinks: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels do not take a layer at all, None where they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 and bfloat16, the model runs in {str(dtype).removeprefix('torch.')}"
    if sinks > BLOCK_TOKENS:
        return f"there are {sinks} sinks, more than {BLOCK_TOKENS}"
    return why_not_rebuilt(codecs, device)


def why_rebuilt(codecs: LayerKernels, n_heads: int, n_blocks: int, device: torch.device) -> str | None:
    """Return why generation must rebuild a layer's pages as a prompt's chunk does, None where a kernel decodes from
    them. n_blocks: of a packed page."""
    if codecs.cached_rotated:
        return why_not_rotated(codecs, page_blocks=n_blocks, device=device)
    return why_not_paged(codecs, n_heads=n_heads, page_blocks=n_blocks, device=device)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer's pages as the kernels take them. n_heads: of queries; decode: None where generation rebuilds pages as
    chunks do."""

    cache: LayerCache
    n_heads: int
    words: Mapping[Part, Tensor]
    exact: ExactPages
    decode: PagedLayer | RotatedLayer | None
    chunk: RebuiltLayer

    @classmethod
    def of(
        cls, cache: LayerCache, *, n_heads: int, scaling: float, n_tokens: int, recent: int, most_queries: int
    ) -> FusedLayer:
        """n_tokens: of the longest sequence. why_not_fused has said that the kernels take it."""
        keys, values = (x.transpose(1, 2) for x in exact_parts(cache.exact))
        exact = ExactPages(keys, values, keys[:, : cache.sinks], values[:, : cache.sinks])
        words: dict[Part, Tensor] = {
            part: cache.layout.rows(cache.packed, part).view(torch.int32) for part in ("key", "value")
        }
        most_exact = cache.sinks + recent + BLOCK_TOKENS - 1 + most_queries
        decode: PagedLayer | RotatedLayer | None = paged_layer(
            cache.codecs, words["key"], words["value"], exact, n_heads=n_heads, scaling=scaling, n_tokens=n_tokens,
            most_exact=most_exact,
        ) or rotated_layer(
            cache.codecs, words["key"], words["value"], exact, scaling=scaling, n_tokens=n_tokens,
            most_exact=most_exact,
        )  # fmt: skip
        chunk = rebuilt_layer(cache.codecs, words["key"], words["value"], exact, scaling)
        assert chunk is not None
        return cls(cache, n_heads, words, exact, decode, chunk)

    @property
    def encoded_sites(self) -> list[EncodedSite | EncodedRotatedKeys]:
        codecs = self.cache.codecs
        assert codecs.key_site is not None and codecs.value_site is not None
        values = EncodedSite(codecs.value_site, self.exact.values, self.words["value"], None)
        if codecs.cached_rotated:
            return [EncodedRotatedKeys(codecs, self.exact.keys, self.words["key"]), values]
        return [EncodedSite(codecs.key_site, self.exact.keys, self.words["key"], codecs.rotary), values]


class FusedModel:
    """All layers of a model, and the memory that they share, whose addresses stay for the model's life."""

    def __init__(
        self, layers: Mapping[str, FusedLayer], most_tokens: int, most_rows: int, attend: Attend | None
    ) -> None:
        """most_tokens: query tokens of a step of generation; most_rows: sequences of one; attend: for chunks, the
        engine's own exact attention, or torch's."""
        self.layers, self._attend_exactly = dict(layers), attend
        first = next(iter(self.layers.values()))
        device, self.pages = first.exact.keys.device, first.cache.exact.data_ptr()
        decoded = [layer.decode for layer in self.layers.values()]
        paged = [decode for decode in decoded if isinstance(decode, PagedLayer)]
        self.workspace: Workspace | None = workspace_for(paged, most_tokens) if paged else None
        #: Whether a CUDA graph may record a step of generation: it reads no number of the host.
        self.recordable = None not in decoded
        self._first_rotated = next((decode for decode in decoded if isinstance(decode, RotatedLayer)), None)
        self._places: ExactPlaces | None = None
        self.tiles = Tiles.of(first.exact)
        self._encoding = RecordedEncoding([site for layer in self.layers.values() for site in layer.encoded_sites])
        self._into = StepTokens.of(most_tokens, most_rows, device)

    def warm_up(self, most_tokens: int) -> int:
        """Do once, on page 0, which nobody reads, what the first requests do, so that they wait for no compilation;
        return how many sets of levels there were to compile.

        most_tokens: of a step. Ranks that choose gains together must all do it at once. What decodes keys in turns is
        compiled already, and begin_step by the engine's own first steps.
        """
        from kvcompress.kernels.encode import FEW_TOKENS  # here: with Triton

        layers, long = list(self.layers.values()), min(most_tokens, FEW_TOKENS + BLOCK_TOKENS)
        packing = [(site.kernels, site.words) for layer in layers for site in layer.encoded_sites]
        n_compiled = compile_packing(packing)
        rotated = [layer.decode for layer in layers if isinstance(layer.decode, RotatedLayer)]
        compile_rotated(rotated, n_heads=layers[0].n_heads, most=self._into.rows.numel())
        for layer in layers:
            for n_tokens in sorted({BLOCK_TOKENS, long // BLOCK_TOKENS * BLOCK_TOKENS} - {0}):
                self._read_nothing(layer, n_tokens)
        for n_blocks in _RECORDED_AHEAD:
            nothing = torch.full((n_blocks,), -1, dtype=torch.int32, device=self._into.rows.device)
            self._encoding.encode(nothing, nothing, nothing.new_zeros(1, n_blocks * BLOCK_TOKENS))
        return n_compiled

    def _read_nothing(self, layer: FusedLayer, n_tokens: int) -> None:
        """Encode a prompt's chunk of zeros into page 0, and attend to it and to what lies there."""
        exact = layer.exact.keys
        key = exact.new_zeros(n_tokens, *exact.shape[2:])
        query = key.new_zeros(n_tokens, layer.n_heads, key.shape[2])
        pages = torch.zeros(n_tokens // BLOCK_TOKENS + 2, dtype=torch.int64, device=key.device)
        row = Row(0, n_tokens, 0, 0, pages, pages, 0)
        encode_chunk(layer.cache, row, key, key)
        cached = Context(2 * BLOCK_TOKENS, BLOCK_TOKENS, pages.int(), pages.int(), 0)
        self.attend_chunk(layer, cached, query, key, key)

    def begin(self, step: Step, n_tokens: int) -> QueryTokens:
        """Note a step's query tokens of generation, its first n_tokens ones, and share the work out among them."""
        into, n_rows, own = self._into, len(step.lengths), slice(0, n_tokens)
        if self.workspace is not None:
            begin_step(
                step.starts, step.lengths, step.exact_table, recent=step.recent, n_tokens=n_tokens, into=into,
                workspace=self.workspace,
            )  # fmt: skip
        else:
            token = torch.arange(n_tokens, dtype=torch.int32, device=into.rows.device)
            into.rows[own], into.lengths[own], into.encoded[own] = step.query_tokens_of(token)
            into.sinks[:n_rows] = step.exact_table[:, 0]
        return QueryTokens(
            into.rows[own], into.lengths[own], into.encoded[own], step.packed_table, step.exact_table,
            into.sinks[:n_rows],
        )  # fmt: skip

    def encode_completed(self, step: Step) -> None:
        """Encode what generation completed, all layers, without waiting for the device."""
        layer = next(iter(self.layers.values()))
        turn = layer.cache.codecs.turn
        sources, destinations, first = step.blocks_in_pages(layer.cache.layout.n_blocks)
        within = torch.arange(BLOCK_TOKENS, dtype=torch.int32, device=first.device)
        positions = (first[:, None] + within).view(1, -1) // turn * turn
        self._encoding.encode(sources, destinations, positions)

    def attend(self, layer: FusedLayer, query: Tensor, tokens: QueryTokens, out: Tensor) -> None:
        """Write attention of a step's query tokens of generation into `out`, [n, heads, head_dim] like query."""
        decode = layer.decode
        if isinstance(decode, PagedLayer):
            assert self.workspace is not None
            paged_attention(decode, query, tokens, self.workspace, out)
            return
        assert decode is not None, "without a kernel that decodes, all rows are attended to as chunks"
        if decode is self._first_rotated:  # anew in every forward, so that a CUDA graph records it
            self._places = ExactPlaces.of(decode, tokens)
        rotated_attention(decode, query, tokens, out, places=self._places)

    def contexts(self, step: Step) -> list[tuple[Row, Context]]:
        """Return the rows that are attended to as chunks, those whose new tokens come after the n_generating first
        ones, and what is cached before each."""
        found = []
        for row in step.rows:
            if row.start >= step.n_generating:
                pages, exact = row.pages.int(), row.exact.int()
                found.append((row, Context(row.computed, row.n_packed, pages, exact, row.first_exact)))
        return found

    def attend_chunk(self, layer: FusedLayer, context: Context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention of a row's new tokens, whose own keys and values are given: [n_new, heads, head_dim]."""
        attend = self._attend_exactly
        return chunk_attention(layer.chunk, query, key, value, context=context, tiles=self.tiles, attend=attend)
