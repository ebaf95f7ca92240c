"""Readable torch for what the engine asks of a layer: store, encode, attend. Any device; the run time's own attention.

A *step* brings to each sequence of a batch a few new tokens; its earlier tokens lie in pages. Tables name a sequence's
pages by position; page 0 is the engine's null page, which nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.model_spec import Part
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attention import tiled_attention
from kvcompress.vllm.pages import PageLayout, exact_parts


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a step. start: its first query token's place in the batch; n_new of them come after `computed`
    tokens, of which they see `n_packed` packed; pages: those of its packed tokens; exact: of its exact ones (int64);
    first_exact: the first of those, where its sinks are."""

    start: int
    n_new: int
    computed: int
    n_packed: int
    pages: Tensor
    exact: Tensor
    first_exact: int

    @property
    def new(self) -> slice:
        return slice(self.start, self.start + self.n_new)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's pages: packed uint8 [n, bytes], exact [n, heads, 32, 2 head_dim]; how many first tokens stay
    exact."""

    codecs: LayerKernels
    layout: PageLayout
    packed: Tensor
    exact: Tensor
    sinks: int


def store_exact(cache: LayerCache, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write new tokens into exact pages. key, value: [n_tokens, heads, head_dim]; slots: [n_tokens], page * 32 + place.

    Tokens without a page (slots of page 0, or negative ones) are written into page 0, which nobody reads.
    """
    slots = slots.clamp_min(0).long()
    cache.exact[slots // BLOCK_TOKENS, :, slots % BLOCK_TOKENS] = torch.cat([key, value], -1).to(cache.exact.dtype)


def encode_chunk(cache: LayerCache, row: Row, key: Tensor, value: Tensor) -> None:
    """Encode the blocks that a row's new tokens complete into its packed pages. key, value: the row's, [n_new,
    heads, d]."""
    first, stop = row.computed // BLOCK_TOKENS, (row.computed + row.n_new) // BLOCK_TOKENS
    if stop == first:
        return
    early = row.computed % BLOCK_TOKENS  # tokens of the first block that came in earlier steps
    used = (stop - first) * BLOCK_TOKENS - early
    key, value = key[:used].transpose(0, 1), value[:used].transpose(0, 1)
    if early:
        keys, values = _exact_block(cache, row, first)
        key = torch.cat([keys[:, :early].to(key.dtype), key], 1)
        value = torch.cat([values[:, :early].to(value.dtype), value], 1)
    _encode(cache, key[None], value[None], first, row.pages)


def encode_block(cache: LayerCache, row: Row, block: int) -> None:
    """Encode a complete block of a row's earlier tokens from its exact page."""
    keys, values = _exact_block(cache, row, block)
    _encode(cache, keys[None], values[None], block, row.pages)


def _exact_block(cache: LayerCache, row: Row, block: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values in the exact page of a block: [heads, 32, head_dim] each."""
    # A list of one page: to take one by a number on the device would wait for the device.
    return exact_parts(cache.exact[row.exact[block : block + 1]][0])


def _encode(cache: LayerCache, keys: Tensor, values: Tensor, block: int, pages: Tensor) -> None:
    """keys, values: [1, heads, n_blocks * 32, head_dim], of block `block` and its followers. Nothing waits for the
    device: in a prompt's chunk the host launches the next layers meanwhile."""
    first = block * BLOCK_TOKENS
    positions = torch.arange(first, first + keys.shape[2], dtype=torch.int32, device=keys.device)
    blocks = torch.arange(block, block + keys.shape[2] // BLOCK_TOKENS, device=keys.device)
    turn = cache.codecs.turn
    packed_keys = cache.codecs.pack_keys(keys, (positions // turn * turn)[None])
    packed_values = cache.codecs.pack_values(values)
    page, place = pages[blocks // cache.layout.n_blocks], blocks % cache.layout.n_blocks
    cache.layout.rows(cache.packed, "key")[page, place] = packed_keys[0].view(torch.uint8)
    cache.layout.rows(cache.packed, "value")[page, place] = packed_values[0].view(torch.uint8)


def attend(cache: LayerCache, row: Row, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return a row's attention [n_new, heads, head_dim]; query, key, value: the row's, [n_new, heads, head_dim]."""
    keys, values = _exact_tokens(cache, row, key, value)
    n_exact, n_seen = keys.shape[2], row.computed + row.n_new
    if row.n_packed == 0:
        mask = _causal(row.n_new, n_exact, query.device) if row.n_new > 1 else None
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return output[0].transpose(0, 1)
    mask = _causal(row.n_new, n_seen, query.device)[None, None] if row.n_new > 1 else None
    view = _PagedTokens.of(cache, row, keys, values)
    return tiled_attention(view, query.transpose(0, 1)[None], mask, scaling)[0]  # type: ignore[arg-type]


def _causal(n_queries: int, n_tokens: int, device: torch.device) -> Tensor:
    """Return which tokens each of the last n_queries tokens sees: bool [n_queries, n_tokens]."""
    seen = torch.ones(n_queries, n_tokens, dtype=torch.bool, device=device)
    return seen.tril(n_tokens - n_queries)


def _exact_tokens(cache: LayerCache, row: Row, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values that the row sees exactly beside the sinks, in order: [1, heads, n, head_dim]."""
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if row.computed == row.n_packed:
        return key[None], value[None]
    first = row.n_packed // BLOCK_TOKENS
    pages = cache.exact[row.exact[first : -(-row.computed // BLOCK_TOKENS)]]  # [n, heads, 32, 2 head_dim]
    old = pages.transpose(0, 1).flatten(1, 2)[:, : row.computed - row.n_packed]
    old_keys, old_values = exact_parts(old)
    return torch.cat([old_keys, key], 1)[None], torch.cat([old_values, value], 1)[None]


@dataclass(frozen=True)
class _PagedTokens:
    """A row's tokens as tiled_attention takes a layer of the run time's cache; see CompressedLayer."""

    codecs: LayerKernels
    packed_keys: Tensor
    packed_values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    keys: Tensor
    values: Tensor
    n_encoded: int
    n_held: int
    sinks: int
    n_dropped: int = 0

    @classmethod
    def of(cls, cache: LayerCache, row: Row, keys: Tensor, values: Tensor) -> _PagedTokens:
        n_pages = -(-row.n_packed // cache.layout.n_tokens)
        n_blocks = row.n_packed // BLOCK_TOKENS

        def packed(part: Part) -> Tensor:
            rows = cache.layout.rows(cache.packed, part)[row.pages[:n_pages]].flatten(0, 1)[:n_blocks]
            coded = cache.codecs.key if part == "key" else cache.codecs.value
            return (rows if coded is not None else rows.view(keys.dtype))[None]

        sink_pages = cache.exact[row.exact[: -(-cache.sinks // BLOCK_TOKENS)]]
        sink_keys, sink_values = exact_parts(sink_pages.transpose(0, 1).flatten(1, 2)[:, : cache.sinks])
        return cls(
            cache.codecs,
            packed("key"),
            packed("value"),
            sink_keys[None],
            sink_values[None],
            keys,
            values,
            row.n_packed,
            row.computed + row.n_new,
            cache.sinks,
        )

    @property
    def tokens(self) -> _PagedTokens:
        return self

    def get_seq_length(self) -> int:
        return self.n_held

    def sink_slots(self) -> Tensor:
        return torch.arange(self.sinks, device=self.keys.device)[None]

    def key_positions(self, first: int, stop: int) -> Tensor:
        slots = torch.arange(first, stop, dtype=torch.int32, device=self.keys.device)
        return (slots // self.codecs.turn * self.codecs.turn)[None]
