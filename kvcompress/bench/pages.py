"""What pages cost: attention over the same packed tokens in one tensor and in pages, chunks of prompts, encoding."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.bench.timing import cold_copies, median_replay_seconds, median_seconds
from kvcompress.bench.workload import RECENT, SINKS, Shape, random_layer
from kvcompress.kernels.chunk import Context, Tiles, attend_with_torch, chunk_attention
from kvcompress.kernels.page_views import ExactPages, QueryTokens, page_words
from kvcompress.kernels.paged import PagedLayer, paged_attention, workspace_for
from kvcompress.kernels.paged_layer import paged_layer, rebuilt_layer
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime import fast
from kvcompress.runtime.cache import CompressedLayer


@dataclass(frozen=True, slots=True)
class PagedTiming:
    """One row: microseconds of one layer and one query token of each sequence. difference: of the outputs, relative."""

    keep: float
    context: int
    batch: int
    microseconds: float
    contiguous_microseconds: float
    schedule_microseconds: float
    difference: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pool:
    """Layers whose packed pages lie side by side in the blocks of one pool, as an engine has them."""

    layers: list[PagedLayer]
    tokens: QueryTokens
    contiguous: list[CompressedLayer]


def blocks_of_page(keep: float) -> int:
    """Return how many packed blocks of 32 tokens take about as many bytes as 32 exact tokens: a power of two."""
    return max(4, 1 << round(math.log2(1 / keep)))


def time_pages(
    shape: Shape, keys: dict[int, int], values: dict[int, int], *, keep: float, context: int, batch: int, turn: int,
    page_blocks: int, device: torch.device, dtype: torch.dtype,
) -> PagedTiming:  # fmt: skip
    """Time attention over pages and over the same tokens in one tensor, in this run."""
    pool = random_pool(
        shape,
        keys,
        values,
        context=context,
        batch=batch,
        turn=turn,
        page_blocks=page_blocks,
        device=device,
        dtype=dtype,
    )
    query = torch.randn(batch, shape.n_heads, shape.head_dim, device=device, dtype=dtype)
    out, scaling = torch.empty_like(query), shape.head_dim**-0.5
    workspace = workspace_for(pool.layers, batch)
    workspace.schedule(pool.tokens.encoded)
    paged = median_replay_seconds(
        [lambda one=one: paged_attention(one, query, pool.tokens, workspace, out) for one in pool.layers],  # type: ignore[misc]
        device,
    )
    whole = median_replay_seconds(
        [lambda one=one: fast.attention(one, query.unsqueeze(2), None, scaling) for one in pool.contiguous],  # type: ignore[misc]
        device,
    )
    schedule = median_replay_seconds([lambda: workspace.schedule(pool.tokens.encoded)], device)
    expected = fast.attention(pool.contiguous[0], query.unsqueeze(2), None, scaling)
    assert expected is not None
    error = paged_attention(pool.layers[0], query, pool.tokens, workspace, out).float() - expected[:, 0].float()
    difference = float(error.norm() / expected.float().norm())
    return PagedTiming(keep, context, batch, paged * 1e6, whole * 1e6, schedule * 1e6, difference)


def random_pool(
    shape: Shape, keys: dict[int, int], values: dict[int, int], *, context: int, batch: int, turn: int,
    page_blocks: int, device: torch.device, dtype: torch.dtype,
) -> Pool:  # fmt: skip
    """Return so many layers of random tokens that their packed pages do not fit the GPU's cache, in one pool."""

    def filled() -> CompressedLayer:
        return random_layer(shape, keys, values, n_tokens=context, batch=batch, device=device, dtype=dtype, turn=turn)

    contiguous = [filled()]
    contiguous += [filled() for _ in range(cold_copies(contiguous[0].nbytes(), device) - 1)]
    n_blocks = context // BLOCK_TOKENS
    n_pages = -(-n_blocks // page_blocks)
    table = (torch.randperm(batch * n_pages, device=device) + 1).view(batch, n_pages)
    rows = [part.shape[2] for part in _packed(contiguous[0])]
    page_bytes = page_blocks * sum(rows)
    pages = torch.zeros(batch * n_pages + 1, len(contiguous), page_bytes, dtype=torch.uint8, device=device)
    n_exact_pages = (context + RECENT) // BLOCK_TOKENS + 1
    kept = 1 + -(-(RECENT + 1) // BLOCK_TOKENS)  # the sinks' page and the window's
    exact_table = torch.zeros(batch, n_exact_pages, dtype=torch.int32, device=device)
    own = torch.arange(batch * kept, dtype=torch.int32, device=device).view(batch, kept) + 1
    exact_table[:, 0], exact_table[:, n_blocks : n_blocks + kept - 1] = own[:, 0], own[:, 1:]
    layers = []
    for i, layer in enumerate(contiguous):
        key_words, value_words = (
            _in_pages(part, page_words(pages[:, i], page_blocks, row // 4, offset), table)
            for offset, row, part in zip((0, page_blocks * rows[0]), rows, _packed(layer), strict=True)
        )
        exact = _exact_pages(layer, exact_table, batch * kept + 1, n_blocks)
        made = paged_layer(
            layer.codecs, key_words, value_words, exact, n_heads=shape.n_heads, scaling=shape.head_dim**-0.5,
            n_tokens=context + RECENT, most_exact=SINKS + RECENT + BLOCK_TOKENS,
        )  # fmt: skip
        assert made is not None, "the kernels take every shape that is timed"
        layers.append(made)
    lengths, encoded = (torch.full((batch,), n, dtype=torch.int32, device=device) for n in (context + RECENT, context))
    row_numbers = torch.arange(batch, dtype=torch.int32, device=device)
    sinks = exact_table[:, 0].contiguous()
    return Pool(layers, QueryTokens(row_numbers, lengths, encoded, table.int(), exact_table, sinks), contiguous)


def _in_pages(rows: Tensor, words: Tensor, table: Tensor) -> Tensor:
    """Write packed rows [batch, n_blocks, bytes] into the pages [batch, n_pages] of a table, and return `words`."""
    n_pages, page_blocks = table.shape[1], words.shape[1]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, n_pages * page_blocks - rows.shape[1])).view(torch.int32)
    words[table] = padded.unflatten(1, (n_pages, page_blocks))
    return words


def _packed(layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    assert layer.packed_keys is not None and layer.packed_values is not None
    return layer.packed_keys, layer.packed_values


def _exact_pages(layer: CompressedLayer, table: Tensor, n_pages: int, n_blocks: int) -> ExactPages:
    """Return a layer's sinks and window in pages as vLLM lays them out: [pages, KV heads, 32, 2 head_dim]."""
    _, n_kv_heads, n_recent, head_dim = layer.keys.shape
    pages = torch.zeros(
        n_pages, n_kv_heads, BLOCK_TOKENS, 2 * head_dim, dtype=layer.keys.dtype, device=layer.keys.device
    )
    assert layer.sink_keys is not None and layer.sink_values is not None
    pages[table[:, 0], :, : layer.sink_keys.shape[2]] = torch.cat([layer.sink_keys, layer.sink_values], -1)
    for first in range(0, n_recent, BLOCK_TOKENS):
        both = torch.cat([x[:, :, first : first + BLOCK_TOKENS] for x in (layer.keys, layer.values)], -1)
        pages[table[:, n_blocks + first // BLOCK_TOKENS], :, : both.shape[2]] = both
    keys, values = pages[..., :head_dim].transpose(1, 2), pages[..., head_dim:].transpose(1, 2)
    n_sinks = layer.sink_keys.shape[2]
    return ExactPages(keys, values, keys[:, :n_sinks], values[:, :n_sinks])


@dataclass(frozen=True, slots=True)
class ChunkTiming:
    """Microseconds of one layer: a chunk of n_new tokens after `context` cached ones, over pages and uncompressed."""

    keep: float
    context: int
    n_new: int
    microseconds: float
    exact_microseconds: float
    rebuild_microseconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_chunk(
    pool: Pool, *, keep: float, n_new: int, tile: int | None = None, attend: Any = attend_with_torch
) -> ChunkTiming:
    """Time the first sequence's chunk; uncompressed: the same attention over exact keys that lie in one tensor."""
    layer, tokens = pool.contiguous[0], pool.tokens
    paged, device = pool.layers[0], tokens.rows.device
    rebuilt = rebuilt_layer(layer.codecs, paged.keys.words, paged.values.words, paged.exact, paged.scaling)
    assert rebuilt is not None
    n_kv_heads, _, head_dim = paged.sizes
    context = int(tokens.lengths[0])
    cached = Context(context, int(tokens.encoded[0]), tokens.pages[0], tokens.exact_pages[0], int(tokens.sinks[0]))

    def random(n: int, heads: int) -> Tensor:
        return torch.randn(n, heads, head_dim, device=device, dtype=layer.keys.dtype)

    query, key, value = random(n_new, paged.n_heads), random(n_new, n_kv_heads), random(n_new, n_kv_heads)
    tiles = Tiles.of(paged.exact, tile)
    ours = median_seconds(
        lambda: chunk_attention(rebuilt, query, key, value, context=cached, tiles=tiles, attend=attend), device
    )
    whole = random(context, n_kv_heads), random(context, n_kv_heads)

    def uncompressed() -> None:
        attend(query, *whole, False, paged.scaling)
        attend(query, key, value, True, paged.scaling)

    def nothing(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
        return query, query.new_zeros(query.shape[1], len(query), dtype=torch.float32)

    exact = median_seconds(uncompressed, device)
    rebuilding = median_seconds(
        lambda: chunk_attention(rebuilt, query, key, value, context=cached, tiles=tiles, attend=nothing), device
    )
    return ChunkTiming(keep, context, n_new, ours * 1e6, exact * 1e6, rebuilding * 1e6)
