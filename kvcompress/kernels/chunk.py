"""Attention of a prompt's chunk over what is cached before it: pages rebuilt tile by tile, scored on the tensor cores.

A chunk has so many queries that scoring rebuilt keys costs less than absorbing each query for every turn. Tiles are
joined by their log-sum-exp, as in FlashDecoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.kernels.page_views import ExactPages
from kvcompress.kernels.rebuild import RebuildMaps, Rotation, rebuild

#: attend(query [n, heads, d], key, value [m, KV heads, d], causal, scaling) -> output [n, heads, d] and log-sum-exp
#: [heads, n]; causal: n = m, a query sees the keys up to its own.
Attend = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


#: Of rebuilt keys and values: launches of small tiles cost Python more than the GPU.
_TILE_BYTES = 144 << 20


@dataclass(frozen=True, slots=True)
class RebuiltSite:
    """Packed rows of a site in pages, and what turns them back into numbers; see rebuild. words: of page_words."""

    maps: RebuildMaps
    words: Tensor
    mean: Tensor | None
    rotation: Rotation | None


@dataclass(frozen=True, slots=True)
class RebuiltLayer:
    """One layer's pages. A chunk of any layer that kernels pack can be attended to, whatever its keys' positions."""

    keys: RebuiltSite
    values: RebuiltSite
    exact: ExactPages
    scaling: float


@dataclass(frozen=True, slots=True)
class Context:
    """What of one sequence is cached before its chunk. n_tokens: all; n_packed: those of them, the first, that are seen
    packed, whole blocks of 32, sinks aside; pages, exact_pages: int32, the sequence's rows of the tables; sinks: where
    its sinks lie, see ExactPages."""

    n_tokens: int
    n_packed: int
    pages: Tensor
    exact_pages: Tensor
    sinks: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where rebuilt tokens lie until they are attended to: [n_tokens, KV heads, head_dim] in the model's dtype."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, exact: ExactPages, n_tokens: int | None = None) -> Tiles:
        """Return room for so many tokens, a multiple of 32. Raises OptionError for another number.

        By default as many as _TILE_BYTES hold: with 8 KV heads of 128, a context of 32k and what came after it.
        """
        if n_tokens is None:
            token_bytes = 2 * exact.keys.shape[2] * exact.keys.shape[3] * exact.keys.element_size()
            n_tokens = max(_TILE_BYTES // token_bytes // BLOCK_TOKENS, 1) * BLOCK_TOKENS
        if n_tokens < BLOCK_TOKENS or n_tokens % BLOCK_TOKENS:
            raise OptionError(f"a tile of {n_tokens} tokens does not hold whole blocks of {BLOCK_TOKENS}.")
        keys, values = (exact.keys.new_empty(n_tokens, *exact.keys.shape[2:]) for _ in range(2))
        return cls(keys, values)


def chunk_attention(
    layer: RebuiltLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    context: Context,
    tiles: Tiles,
    attend: Attend | None = None,
) -> Tensor:
    """Return attention of a chunk's queries over what is cached before it and, causally, over the chunk.

    query: [n, heads, head_dim], as what is returned; key, value: [n, KV heads, head_dim], the chunk's own, after RoPE.
    attend: by default what this torch has.
    """
    attend = attend or attend_with_torch
    output, total = attend(query, key, value, True, layer.scaling)
    if context.n_tokens == 0:
        return output
    outputs, totals = [output], [total]
    for first in range(0, context.n_tokens, len(tiles.keys)):
        stop = min(first + len(tiles.keys), context.n_tokens)
        keys, values = (x[: stop - first] for x in (tiles.keys, tiles.values))
        _gather(layer.keys, layer.exact.keys, layer.exact.sink_keys, context, first, keys)
        _gather(layer.values, layer.exact.values, layer.exact.sink_values, context, first, values)
        output, total = attend(query, keys, values, False, layer.scaling)
        outputs.append(output)
        totals.append(total)
    return join(torch.stack(outputs), torch.stack(totals))


def join(outputs: Tensor, totals: Tensor) -> Tensor:
    """Return attention over all keys from that over parts of them: [n, heads, head_dim].

    outputs: [parts, n, heads, head_dim]; totals: [parts, heads, n], the log-sum-exp of each part's scores.
    """
    if not outputs.is_cuda:
        weights = totals.softmax(0).transpose(1, 2).unsqueeze(3)
        return (outputs * weights).sum(0).to(outputs.dtype)
    from kvcompress.kernels.rebuilding import join_kernel

    n_parts, n, n_heads, head_dim = outputs.shape
    outputs, totals = outputs.contiguous(), totals.contiguous()
    out = torch.empty_like(outputs[0])
    join_kernel[(n, n_heads)](
        outputs, totals, out, n_parts, outputs.stride(0), totals.stride(1), DIM=head_dim,
        WIDTH=1 << (head_dim - 1).bit_length(), num_warps=1,
    )  # fmt: skip
    return out


def _gather(site: RebuiltSite, exact: Tensor, sinks: Tensor, context: Context, first: int, out: Tensor) -> None:
    """Write a sequence's cached tokens from `first` on, a multiple of 32, into `out` [n, KV heads, head_dim]."""
    stop, n_packed = first + len(out), min(max(context.n_packed - first, 0), len(out))
    if n_packed:
        rebuild(
            site.maps, site.words, context.pages, out[:n_packed], first_block=first // BLOCK_TOKENS, mean=site.mean,
            rotation=site.rotation,
        )  # fmt: skip
        n_sinks = min(max(sinks.shape[1] - first, 0), n_packed)
        out[:n_sinks] = sinks[context.sinks, first : first + n_sinks]
    if n_packed < len(out):
        page_tokens = exact.shape[1]
        begin = first + n_packed
        pages = context.exact_pages[begin // page_tokens : -(-stop // page_tokens)]
        rest = begin % page_tokens
        out[n_packed:] = exact[pages.long()].flatten(0, 1)[rest : rest + stop - begin]


def attend_with_torch(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend, for Attend: with torch's FlashAttention on a GPU, in float32 by its definition elsewhere."""
    if query.is_cuda:
        output, total, *_ = torch.ops.aten._flash_attention_forward(
            query[None], key[None], value[None], None, None, len(query), len(key), 0.0, causal, False, scale=scaling
        )
        return output[0], total[0]
    repeated = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(repeated, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scaling
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    total = scores.logsumexp(-1)
    output = torch.einsum("hqk,khd->qhd", (scores - total.unsqueeze(-1)).exp(), values)
    return output.to(query.dtype), total
