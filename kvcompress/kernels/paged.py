"""Decode attention over keys in turns whose cache lies in pages: the launches of turned.py, reading through tables.

Each query token of a batch is a line of its own: which row of the tables of pages it reads, how many tokens it sees,
and how many of these are packed. So one call serves sequences of unequal lengths with one or several query tokens each.
All of it lies on the device, and nothing is allocated or read by the host: a CUDA graph records every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels import turned
from kvcompress.kernels.group_layout import GroupLayout
from kvcompress.kernels.launch_shapes import UNIT_TOKENS, Launch, launch_of, passes, turn_rows
from kvcompress.kernels.page_views import ExactPages, QueryTokens
from kvcompress.kernels.paged_workspace import Widths, Workspace
from kvcompress.kernels.turned import (
    COMBINE_THREADS,
    EXACT_TOKENS,
    PREPARE_MEMORY,
    PREPARE_WARPS,
    GroupedSite,
)
from kvcompress.model.rope import Rotary


def turn_angles(rotary: Rotary, turn: int, n_tokens: int, device: torch.device) -> Tensor:
    """Return cos and sin at the first position of every turn of sequences that begin at 0: [1, turns, d / 2, 2]."""
    position = torch.arange(-(-n_tokens // turn), device=device) * turn
    angles = position[:, None].float() * rotary.inv_freq.to(device)
    return (torch.stack([angles.cos(), angles.sin()], -1) * rotary.scale).unsqueeze(0)


@dataclass(frozen=True)
class PagedLayer:
    """One layer's packed and exact pages, made once.

    keys, values: their `words` are of `page_words`. turn: tokens of a turn, 128, 256, ... angles: of `turn_angles`,
    for the longest sequence. most_exact: tokens beside the packed ones that a query sees at most, sinks among them.
    """

    keys: GroupedSite
    values: GroupedSite
    exact: ExactPages
    n_heads: int
    turn: int
    angles: Tensor
    scaling: float
    most_exact: int

    def __post_init__(self) -> None:
        for site in (self.keys, self.values):
            if any(stride % 4 for stride in site.words.stride()[:2]):
                raise OptionError(
                    f"rows {site.words.stride(1)} words apart are not in the tile layout of docs/format.md."
                )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return KV heads, groups of them and dimensions of a head."""
        _, _, n_kv_heads, head_dim = self.exact.keys.shape
        return n_kv_heads, len(self.keys.layout.table), head_dim

    @property
    def n_passes(self) -> int:
        """Return how many passes all query heads of a token take together, of all groups."""
        n_kv_heads, n_groups, _ = self.sizes
        return passes(self.n_heads, n_kv_heads, n_groups)

    @cached_property
    def launch(self) -> Launch:
        n_kv_heads, _, head_dim = self.sizes
        device = self.exact.keys.device
        launch = launch_of(
            self.n_heads,
            n_kv_heads,
            head_dim,
            self.keys.layout,
            self.values.layout,
            device,
            page_blocks=self.keys.words.shape[1],
        )
        assert launch is not None  # see applies
        return launch

    @cached_property
    def constants(self) -> tuple[tuple[str, int], ...]:
        n_kv_heads, n_groups, head_dim = self.sizes
        columns = n_kv_heads // n_groups, self.n_heads // n_kv_heads
        return turned.constants_of(
            self.keys, self.values, self.launch, head_dim, *columns, False, self.exact.keys.dtype,
            page_blocks=self.keys.words.shape[1], exact_page=self.exact.keys.shape[1],
        )  # fmt: skip

    @cached_property
    def n_exact_parts(self) -> int:
        return -(-self.most_exact // EXACT_TOKENS)

    @cached_property
    def first(self) -> Tensor:
        """The first packed token that counts: the sinks' packed copies do not."""
        n_sinks = self.exact.sink_keys.shape[1]
        return torch.tensor([n_sinks], dtype=torch.int32, device=self.exact.keys.device)

    @cached_property
    def key_mean(self) -> Tensor:
        n_kv_heads, _, head_dim = self.sizes
        device = self.exact.keys.device
        return torch.zeros(n_kv_heads * head_dim, device=device) if self.keys.mean is None else self.keys.mean


def applies(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, *, turn: int,
    page_blocks: int, device: torch.device,
) -> bool:  # fmt: skip
    """Return whether the kernels take these sizes; page_blocks: packed blocks of 32 tokens of a page."""
    if turn % UNIT_TOKENS:
        return False
    if not turned.applies(n_heads, n_kv_heads, head_dim, keys, values, device):
        return False
    return launch_of(n_heads, n_kv_heads, head_dim, keys, values, device, page_blocks=page_blocks) is not None


def paged_attention(layer: PagedLayer, query: Tensor, tokens: QueryTokens, workspace: Workspace, out: Tensor) -> Tensor:
    """Write attention of n query tokens over packed pages, sinks and exact pages into `out`, and return it.

    query, out: [n, heads, head_dim], dense in the last dimension; query after RoPE, float16 or bfloat16 as the exact
    tokens. workspace: whose `schedule` was given `tokens.encoded` in this step.
    """
    n, n_heads, _ = query.shape
    if tokens.rows.shape[0] != n or n_heads != layer.n_heads or out.stride(2) != 1:
        raise OptionError(
            f"queries {tuple(query.shape)} do not fit {tokens.rows.shape[0]} query tokens of {layer.n_heads} heads."
        )
    query = query if query.stride(2) == 1 else query.contiguous()
    kernels = turned._kernels(layer.constants, layer.launch.names, layer.launch.memory, query.device)
    for part in workspace.parts(n):
        own = slice(part.first, part.first + part.n)
        step = _Step(layer, query[own], out[own], tokens, own, part.splits, part.starts, workspace)
        _prepare(kernels[0], step)
        _attend(kernels[1], step)
        _combine(kernels[2], step)
    return out


@dataclass(frozen=True, slots=True)
class _Step:
    """Some query tokens of a layer, and the schedule of their splits."""

    layer: PagedLayer
    query: Tensor
    out: Tensor
    tokens: QueryTokens
    own: slice
    splits: Tensor
    starts: Tensor
    workspace: Workspace

    @property
    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens.rows[self.own], self.tokens.lengths[self.own], self.tokens.encoded[self.own]


def _prepare(prepare: Any, step: _Step) -> None:
    layer, exact, workspace, n = step.layer, step.layer.exact, step.workspace, len(step.query)
    n_kv_heads, _, head_dim = layer.sizes
    rows, lengths, encoded = step.seen
    heads = n * n_kv_heads
    group_columns = layer.n_heads // n_kv_heads
    exact_blocks = -(-heads * layer.n_exact_parts // PREPARE_WARPS)
    absorb_blocks = heads * -(-workspace.n_turns // (turn_rows(group_columns) * PREPARE_WARPS))
    n_sinks = exact.sink_keys.shape[1]

    def strides(x: Tensor) -> tuple[int, int, int]:  # from page to page, head to head, token to token
        return x.stride(0), x.stride(2), x.stride(1)

    prepare(
        (exact_blocks + absorb_blocks, 1, 1), (32 * PREPARE_WARPS, 1, 1),
        [
            step.query, layer.keys.maps, layer.key_mean, layer.angles, layer.keys.largest_rows, encoded,
            workspace.absorbed, workspace.biases, exact.sink_keys, exact.sink_values, exact.keys, exact.values,
            step.query, workspace.exact_sums, workspace.exact_stats, n, workspace.n_turns, n_kv_heads,
            (layer.turn // UNIT_TOKENS).bit_length() - 1, 0,
            n_sinks, layer.most_exact - n_sinks, 0, *step.query.stride()[:2], *strides(exact.sink_keys),
            *strides(exact.keys), *strides(exact.values), layer.scaling * 1.4426950408889634, rows, lengths,
            step.tokens.exact_pages, step.tokens.sinks, step.tokens.exact_pages.stride(0),
        ],
        PREPARE_MEMORY * head_dim,
    )  # fmt: skip


def _attend(attend: Any, step: _Step) -> None:
    layer, workspace, (rows, _, encoded) = step.layer, step.workspace, step.seen
    keys, values = layer.keys, layer.values
    shift = (layer.turn // layer.launch.unit_tokens).bit_length() - 1
    attend(
        (len(step.splits) * (layer.n_passes // layer.sizes[1]), layer.sizes[1], 1), (32 * layer.launch.warps, 1, 1),
        [
            keys.words, values.words, keys.layout.table, values.layout.table, workspace.absorbed, workspace.biases,
            layer.first, encoded, step.query, workspace.stats, workspace.sums, 0, workspace.n_turns, shift,
            keys.words.stride(1), values.words.stride(1), 0, 0, keys.gain_word or 0, values.gain_word or 0, 0, rows,
            step.tokens.pages, step.splits, step.tokens.pages.stride(0), keys.words.stride(0),
        ],
        layer.launch.memory,
    )  # fmt: skip


def _combine(combine: Any, step: _Step) -> None:
    layer, workspace, mean = step.layer, step.workspace, step.layer.values.mean
    n_kv_heads, _, _ = layer.sizes
    _, lengths, encoded = step.seen
    n_splits = len(step.splits)
    combine(
        (n_kv_heads, len(step.query), 1), (COMBINE_THREADS, 1, 1),
        [
            workspace.stats, workspace.sums, workspace.exact_sums, workspace.exact_stats, layer.values.maps,
            step.query if mean is None else mean, step.out, n_splits, layer.n_exact_parts, *step.out.stride()[:2],
            int(mean is not None), step.starts, lengths, encoded, layer.exact.sink_keys.shape[1],
        ],
        widths_of(layer).combine_bytes(n_splits),
    )  # fmt: skip


def workspace_for(layers: Sequence[PagedLayer], n_queries: int, *, most_bytes: int = 1 << 28) -> Workspace:
    """Return what paged_attention needs beside its arguments, for any of these layers and up to n_queries query tokens.

    most_bytes: of the absorbed queries, the largest part; where all query tokens at once would need more, some are
    attended to after the others.
    """
    turns = min(layer.angles.shape[1] for layer in layers)
    return Workspace.of(
        [widths_of(layer) for layer in layers], n_queries, turns, most_bytes, layers[0].exact.keys.device
    )


def widths_of(layer: PagedLayer) -> Widths:
    """Return what a layer's launches leave to each other is counted in."""
    n_kv_heads, _, head_dim = layer.sizes
    sets = sum(layer.keys.layout.sets), sum(layer.values.layout.sets)
    return Widths(n_kv_heads, layer.n_passes, layer.n_heads // n_kv_heads, head_dim, *sets, layer.n_exact_parts)
