"""The kernels in the engine: what they need of a model's layers and of a step, at addresses that a CUDA graph can
record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.chunk import Attend, Context, RebuiltLayer, Tiles, chunk_attention
from kvcompress.kernels.layer import LayerKernels
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.paged import ExactPages, PagedLayer, QueryTokens, applies, paged_attention, workspace_for
from kvcompress.kernels.paged_layer import paged_layer, rebuilt_layer
from kvcompress.kernels.paged_step import StepTokens, begin_step
from kvcompress.kernels.paged_workspace import Workspace
from kvcompress.kernels.recorded_encoding import EncodedSite, RecordedEncoding
from kvcompress.kernels.site import kernels_apply, whole_rotation
from kvcompress.model.model_spec import Part
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.pages import exact_parts
from kvcompress.vllm.reference import LayerCache, Row
from kvcompress.vllm.steps import Step


def why_not_fused(
    codecs: LayerKernels, n_heads: int, n_blocks: int, sinks: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why the decode kernels do not take a layer, None where they do. n_blocks: of a packed page."""
    if not kernels_apply(device) or not compiler_works(device):
        return "kernels need an NVIDIA GPU, Triton and NVRTC"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 and bfloat16, the model runs in {str(dtype).removeprefix('torch.')}"
    if codecs.turn == 1:
        return "keys are not in turns (compress --for vllm)"
    if sinks > BLOCK_TOKENS:
        return f"there are {sinks} sinks, more than {BLOCK_TOKENS}"
    if codecs.key_site is None or codecs.value_site is None or codecs.rotary is None:
        return "a part of it is kept whole"
    keys, values = codecs.key_site.grouped, codecs.value_site.grouped
    if keys is None or values is None or not whole_rotation(codecs.rotary, codecs.head_dim):
        return "its rows have no tiles, or RoPE turns a part of a head only"
    sizes = n_heads, codecs.n_kv_heads, codecs.head_dim, keys.layout, values.layout
    if not applies(*sizes, turn=codecs.turn, page_blocks=n_blocks, device=device):
        return f"kernels take no {n_heads} heads of {codecs.head_dim} in groups of this size (compress --for vllm)"
    return None


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer's pages as the kernels take them."""

    cache: LayerCache
    words: Mapping[Part, Tensor]
    exact: ExactPages
    decode: PagedLayer
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
        decode = paged_layer(
            cache.codecs, words["key"], words["value"], exact, n_heads=n_heads, scaling=scaling, n_tokens=n_tokens,
            most_exact=cache.sinks + recent + BLOCK_TOKENS - 1 + most_queries,
        )  # fmt: skip
        chunk = rebuilt_layer(cache.codecs, words["key"], words["value"], exact, scaling)
        assert decode is not None and chunk is not None
        return cls(cache, words, exact, decode, chunk)

    @property
    def encoded_sites(self) -> list[EncodedSite]:
        codecs = self.cache.codecs
        assert codecs.key_site is not None and codecs.value_site is not None
        return [
            EncodedSite(codecs.key_site, self.exact.keys, self.words["key"], codecs.rotary),
            EncodedSite(codecs.value_site, self.exact.values, self.words["value"], None),
        ]


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
        self.workspace: Workspace = workspace_for([layer.decode for layer in self.layers.values()], most_tokens)
        self.tiles = Tiles.of(first.exact)
        self._encoding = RecordedEncoding([site for layer in self.layers.values() for site in layer.encoded_sites])
        self._into = StepTokens.of(most_tokens, most_rows, device)

    def begin(self, step: Step, n_tokens: int) -> QueryTokens:
        """Note a step's query tokens of generation, its first n_tokens ones, and share the work out among them."""
        into, n_rows = self._into, len(step.lengths)
        begin_step(
            step.starts, step.lengths, step.exact_table, recent=step.recent, n_tokens=n_tokens, into=into,
            workspace=self.workspace,
        )  # fmt: skip
        own = slice(0, n_tokens)
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
        paged_attention(layer.decode, query, tokens, self.workspace, out)

    def contexts(self, step: Step) -> list[tuple[Row, Context]]:
        """Return the rows whose new tokens come after those of generation, and what is cached before each."""
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
