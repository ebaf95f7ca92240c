"""Decode attention over pages of keys that were encoded after RoPE (`frequency`): the launches of decode.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.kernels.arguments import Angles, ExactTokens, PackedPages, angle_table
from kvcompress.kernels.layout import PackedSite
from kvcompress.kernels.paged import ExactPages, QueryTokens
from kvcompress.model.rope import Rotary


@dataclass(frozen=True)
class RotatedLayer:
    """One layer's pages, made once. keys, values: their words are of paged.page_words.

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


def rotated_attention(layer: RotatedLayer, query: Tensor, tokens: QueryTokens, out: Tensor) -> Tensor:
    """Write attention of n query tokens into `out`, and return it, as paged.paged_attention does.

    query, out: [n, heads, head_dim]. Memory is allocated, as much in every step: a CUDA graph records it.
    """
    from kvcompress.kernels.decode import packed_attention

    n, device = len(query), query.device
    n_sinks = layer.exact.sink_keys.shape[1]
    first = torch.full((n,), n_sinks, dtype=torch.int32, device=device)
    angles = None if layer.table is None else Angles(layer.table, torch.zeros_like(first))
    attended = packed_attention(
        query.unsqueeze(2),
        layer.keys,
        layer.values,
        first=first,
        last=tokens.encoded,
        n_blocks=layer.n_blocks,
        exact=_exact_tokens(layer, tokens),
        scaling=layer.scaling,
        angles=angles,
        pages=PackedPages(tokens.rows, tokens.pages),
    )
    out.copy_(attended[:, 0].masked_fill((tokens.lengths == 0)[:, None, None], 0))
    return out


def _exact_tokens(layer: RotatedLayer, tokens: QueryTokens) -> ExactTokens:
    """Return the sinks and recent tokens of every query token, gathered; those that are none repeat one that is."""
    exact, rows = layer.exact, tokens.rows.long()
    page_tokens = exact.keys.shape[1]
    position = tokens.encoded[:, None] + torch.arange(layer.most_exact, device=rows.device)
    seen = position < tokens.lengths[:, None]
    position = position.minimum(tokens.lengths[:, None] - 1).clamp_min(0)
    page = tokens.exact_pages[rows[:, None], position // page_tokens].long()
    some = (tokens.encoded > 0)[:, None]
    slot = tokens.sinks[rows].long()

    def gathered(pages: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        recent = pages[page, position % page_tokens]
        first = torch.where(some[..., None, None], sinks[slot], recent[:, :1])
        return recent.transpose(1, 2), first.transpose(1, 2)

    keys, sink_keys = gathered(exact.keys, exact.sink_keys)
    values, sink_values = gathered(exact.values, exact.sink_values)
    mask = torch.cat([some.expand(-1, sink_keys.shape[2]), seen], 1)
    return ExactTokens(keys, values, sink_keys, sink_values, mask.to(torch.uint8))
