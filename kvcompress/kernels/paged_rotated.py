"""Decode attention over pages of keys that were encoded after RoPE (`frequency`): the launches of decode.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.kernels.arguments import Angles, ExactTokens, PackedPages, angle_table
from kvcompress.kernels.layout import PackedSite
from kvcompress.kernels.page_views import ExactPages, QueryTokens
from kvcompress.model.rope import Rotary


@dataclass(frozen=True)
class RotatedLayer:
    """One layer's pages, made once. keys, values: their words are of page_views.page_words.

    rotary: of keys that have a mean, which turns with the position; None of others. n_tokens: of the longest sequence;
    most_exact: recent tokens that a query sees beside the packed ones at most, sinks aside.
    """

    keys: PackedSite
    values: PackedSite
    exact: ExactPages
    rotary: Rotary | None
    scaling: float
    n_tokens: int
    most_exact: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_tokens // 32)

    @cached_property
    def table(self) -> Tensor | None:
        """Cosines and sines of every position."""
        if self.rotary is None:
            return None
        inv_freq = self.rotary.inv_freq.to(self.exact.keys.device)
        return angle_table(inv_freq, self.n_tokens, scale=self.rotary.scale)


@dataclass(frozen=True, slots=True)
class ExactPlaces:
    """Where the exact tokens of a step's query tokens lie, worked out once for all layers.

    page, place: [n, most], of recent tokens, those that are none repeating one that is; some: [n, 1], whether any token
    is packed, and so sinks are read; slot: [n], of the sinks; mask: uint8 [n, sinks + most]; first, origin: int32 [n].
    """

    page: Tensor
    place: Tensor
    some: Tensor
    slot: Tensor
    mask: Tensor
    first: Tensor
    origin: Tensor

    @classmethod
    def of(cls, layer: RotatedLayer, tokens: QueryTokens) -> ExactPlaces:
        """layer: any of those that have equally many sinks and recent tokens in pages of one size."""
        rows, n_sinks, page_tokens = tokens.rows.long(), layer.exact.sink_keys.shape[1], layer.exact.keys.shape[1]
        position = tokens.encoded[:, None] + torch.arange(layer.most_exact, dtype=torch.int32, device=rows.device)
        seen = position < tokens.lengths[:, None]
        position = position.minimum(tokens.lengths[:, None] - 1).clamp_min(0)
        some = (tokens.encoded > 0)[:, None]
        first = torch.full_like(tokens.encoded, n_sinks)
        return cls(
            tokens.exact_pages[rows[:, None], position // page_tokens].long(),
            (position % page_tokens).long(),
            some,
            tokens.sinks[rows].long(),
            torch.cat([some.expand(-1, n_sinks), seen], 1).to(torch.uint8),
            first,
            torch.zeros_like(first),
        )


def rotated_attention(
    layer: RotatedLayer, query: Tensor, tokens: QueryTokens, out: Tensor, *, places: ExactPlaces | None = None
) -> Tensor:
    """Write attention of n query tokens into `out`, and return it, as paged.paged_attention does.

    query, out: [n, heads, head_dim]; places: of this step, for all layers. Memory is allocated, as much in every step:
    a CUDA graph records it.
    """
    from kvcompress.kernels.decode import packed_attention

    places = places or ExactPlaces.of(layer, tokens)
    attended = packed_attention(
        query.unsqueeze(2),
        layer.keys,
        layer.values,
        first=places.first,
        last=tokens.encoded,
        n_blocks=layer.n_blocks,
        exact=_exact_tokens(layer.exact, places),
        scaling=layer.scaling,
        angles=None if layer.table is None else Angles(layer.table, places.origin),
        pages=PackedPages(tokens.rows, tokens.pages),
    )
    out.copy_(attended[:, 0].masked_fill((tokens.lengths == 0)[:, None, None], 0))
    return out


def _exact_tokens(exact: ExactPages, places: ExactPlaces) -> ExactTokens:
    def gathered(pages: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        recent = pages[places.page, places.place]
        first = torch.where(places.some[..., None, None], sinks[places.slot], recent[:, :1])
        return recent.transpose(1, 2), first.transpose(1, 2)

    keys, sink_keys = gathered(exact.keys, exact.sink_keys)
    values, sink_values = gathered(exact.values, exact.sink_values)
    return ExactTokens(keys, values, sink_keys, sink_values, places.mask)
