"""How a folded layer looks to a stock engine: groups of KV heads, each with virtual heads that make one wide head.

One group of r virtual heads of d numbers is ordinary attention with head_dim r * d: the group's query heads are
widened by the decoder, so that q . (D z) = (D^T q) . z, and one key head of r * d numbers is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.errors import UnsupportedModelError
from kvcompress.model import blocks
from kvcompress.model.model_spec import PARTS, AttentionSpec, ModelSpec, Part, Site

#: Widths of a head that the engines' kernels have, where it is not the model's own.
WIDE_HEADS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class Group:
    """KV heads of the original that share one stock KV head, and the virtual heads (their indices) that it holds."""

    heads: tuple[int, ...]
    virtual: dict[Part, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StockLayer:
    """One layer as a stock engine will have it; `maps` is None for a site that is kept whole."""

    attention: AttentionSpec
    groups: tuple[Group, ...]
    maps: dict[Part, SiteMaps | None]

    @property
    def n_kv_heads(self) -> int:
        return len(self.groups)

    @property
    def n_virtual(self) -> int:
        """r: virtual heads in one stock head."""
        return len(self.groups[0].virtual["key"])

    @property
    def head_dim(self) -> int:
        return self.n_virtual * self.attention.head_dim

    @property
    def query_order(self) -> tuple[int, ...]:
        """Original numbers of the query heads, in the order of the groups that they read."""
        per_head = self.attention.n_heads // self.attention.n_kv_heads
        return tuple(h * per_head + i for group in self.groups for h in group.heads for i in range(per_head))

    def cached_rows(self, part: Part) -> Tensor:
        """Return, for every number of the stock heads, the row of the folded projection that makes it: [R].

        Keys of a wide head are laid out for RoPE in half-split pairs: copy t of frequency j is pair r * j + t.
        """
        d = self.attention.head_dim
        numbers = torch.arange(d)
        if part == "key" and self.maps["key"] is None:  # the model's own layout of pairs, which may be partial
            numbers = blocks.channel_pairs(self.attention).T.flatten()
        rows = [(torch.tensor(group.virtual[part])[:, None] * d + numbers).flatten() for group in self.groups]
        places = self.key_places() if part == "key" else torch.arange(self.head_dim)
        order = places.argsort()
        return torch.cat([r[order] for r in rows])

    def key_places(self) -> Tensor:
        """Return the place in a stock key head of number c (real, then imaginary parts) of virtual head t: [r * d]."""
        r, half = self.n_virtual, self.attention.head_dim // 2
        t, imaginary, pair = torch.meshgrid(torch.arange(r), torch.arange(2), torch.arange(half), indexing="ij")
        return (imaginary * r * half + pair * r + t).flatten()

    def decoder(self, part: Part, group: Group, head: int) -> Tensor:
        """Return what decodes one original head from its group's stock head: [d, r * d], float64."""
        d, maps = self.attention.head_dim, self.maps[part]
        if maps is None:
            own = torch.zeros(d, self.n_virtual, d, dtype=torch.float64)
            numbers = blocks.channel_pairs(self.attention).T.flatten() if part == "key" else torch.arange(d)
            own[numbers, group.virtual[part].index(head), torch.arange(d)] = 1.0
            dense = own.flatten(1)
        else:
            rows = (torch.tensor(group.virtual[part])[:, None] * d + torch.arange(d)).flatten()
            wide = torch.zeros(len(rows), maps.blocks.numel(), dtype=torch.float64)
            wide.scatter_(1, maps.blocks.long()[maps.block[rows].long()], maps.decoder[rows].double())
            dense = wide[:, head * d : (head + 1) * d].T
        return dense[:, self.key_places().argsort()] if part == "key" else dense


def stock_layers(spec: ModelSpec, maps: dict[Site, SiteMaps]) -> list[StockLayer]:
    """Return every layer as a stock engine will have it, all with heads of one width.

    Raises UnsupportedModelError for a plan that no engine takes: different numbers of key and value heads in a
    layer, layers whose heads cannot have one width, or a width that kernels lack.
    """
    layers = [_stock_layer(a, maps) for a in spec.layers]
    widest = max(layer.n_virtual for layer in layers)
    layers = [_widened(layer, widest) for layer in layers]
    if widest > 1 and layers[0].head_dim not in WIDE_HEADS:
        raise UnsupportedModelError(
            f"{widest} virtual heads of {spec.layers[0].head_dim} make heads {layers[0].head_dim} wide; engines have "
            f"kernels for {', '.join(map(str, WIDE_HEADS))}. Compress with --key-basis grouped, which keeps head_dim."
        )
    return layers


def _stock_layer(attention: AttentionSpec, maps: dict[Site, SiteMaps]) -> StockLayer:
    """Return a layer with as many groups as its decoders allow."""
    d, n_heads = attention.head_dim, attention.n_kv_heads
    own = {part: maps.get(Site(attention.layer, part)) for part in PARTS}
    touched = {part: _touched_heads(own[part], attention) for part in PARTS}
    counts = {part: len(touched[part]) for part in PARTS}
    if counts["key"] != counts["value"] or not counts["key"]:
        raise UnsupportedModelError(
            f"layer {attention.layer} caches {counts['key']} key and {counts['value']} value heads of {d}; engines "
            "cache as many of both, and at least one. Compress with --folded --key-basis grouped, or --policy uniform."
        )
    groups = []
    for heads in _connected(n_heads, [*touched["key"], *touched["value"]]):
        virtual = {
            part: tuple(t for t, own_heads in enumerate(touched[part]) if own_heads <= set(heads)) for part in PARTS
        }
        groups.append(Group(heads, virtual))
    shapes = {(len(g.heads), len(g.virtual["key"]), len(g.virtual["value"])) for g in groups}
    if len(shapes) > 1 or len({*next(iter(shapes))[1:]}) > 1:  # unequal groups: one of everything
        everything = tuple(range(counts["key"]))
        groups = [Group(tuple(range(n_heads)), {"key": everything, "value": everything})]
    return StockLayer(attention, tuple(groups), own)


def _touched_heads(maps: SiteMaps | None, attention: AttentionSpec) -> list[set[int]]:
    """Return the original heads that each virtual head is decoded into."""
    d = attention.head_dim
    if maps is None:
        return [{h} for h in range(attention.n_kv_heads)]
    if len(maps.block) % d:
        raise UnsupportedModelError(
            f"layer {attention.layer} caches {len(maps.block)} numbers a token, which are no whole heads of {d}. "
            "Compress with --folded."
        )
    heads = maps.blocks.long()[maps.block.long()] // d  # [R, w]
    return [set(heads[i : i + d][maps.decoder[i : i + d] != 0].tolist()) for i in range(0, len(heads), d)]


def _connected(n_heads: int, sets: Sequence[set[int]]) -> list[tuple[int, ...]]:
    """Return the heads in classes: two heads that one set holds are in one class."""
    classes = [{h} for h in range(n_heads)]
    for heads in sets:
        joined = [c for c in classes if c & heads]
        if joined:
            classes = [c for c in classes if not c & heads] + [set().union(*joined)]
    return sorted(tuple(sorted(c)) for c in classes)


def _widened(layer: StockLayer, n_virtual: int) -> StockLayer:
    """Return the layer with neighbouring groups merged until each holds `n_virtual` virtual heads."""
    merged = n_virtual // layer.n_virtual
    if n_virtual % layer.n_virtual or len(layer.groups) % merged:
        raise UnsupportedModelError(
            f"layer {layer.attention.layer} has {len(layer.groups)} groups of {layer.n_virtual} virtual heads, another "
            f"layer has groups of {n_virtual}: heads of one width cannot hold both, as every engine needs. "
            "Compress with --folded --key-basis grouped, or --policy uniform."
        )
    groups = []
    for i in range(0, len(layer.groups), merged):
        parts = layer.groups[i : i + merged]
        virtual = {part: tuple(t for g in parts for t in g.virtual[part]) for part in PARTS}
        groups.append(Group(tuple(h for g in parts for h in g.heads), virtual))
    return replace(layer, groups=tuple(groups))
