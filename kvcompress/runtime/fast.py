"""The kernels at the cache's service: used by themselves on a GPU, the torch reference everywhere else.

Every function here returns None where the kernels do not apply, and the caller goes on with the reference.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.kernels.arguments import Angles, ExactTokens, angle_table
from kvcompress.kernels.group_layout import GroupLayout, decoder_fragments, group_layout, head_decoders
from kvcompress.kernels.launch_shapes import UNIT_TOKENS
from kvcompress.kernels.layout import LEVELS, PackedSite, row_words
from kvcompress.kernels.nvrtc import compiler_works
from kvcompress.kernels.turned import MOST_EXACT, GroupedSite, applies, turned_attention
from kvcompress.model.rope import Rotary
from kvcompress.plan import BLOCK_TOKENS

if TYPE_CHECKING:
    from kvcompress.runtime.cache import CompressedLayer, TokenLine

#: More (heads * query tokens) than this are a prompt: decoding tiles of keys and values is then cheaper.
_MOST_COLUMNS = 256
#: Of keys in turns, whose kernels take one query token at a time.
_MOST_QUERIES = 8


@dataclass(frozen=True, slots=True)
class _Dense:
    """A codec's maps as whole matrices, rows in packed order, steps folded in: [R, n] float16."""

    encoder: Tensor
    decoder: Tensor
    counts: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The masks of one step, and what they were made for; see _visible."""

    sizes: tuple[int, int, int]
    mask: Tensor | None
    start: Tensor
    exact: Tensor
    packed: Tensor | None
    first: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class _Groups:
    """A tiled codec's layout, maps and mean as the kernels for turns take them; see kernels.turned.GroupedSite."""

    layout: GroupLayout
    maps: Tensor
    mean: Tensor | None


@dataclass(frozen=True, slots=True)
class _TurnAngles:
    """table: cos and sin at the first position of each turn, [1 or batch, turns, rotary_dim / 2, 2]; and of what."""

    origin: Tensor
    turn: int
    table: Tensor


_dense: WeakKeyDictionary[SiteCodec, _Dense] = WeakKeyDictionary()
_groups: WeakKeyDictionary[SiteCodec, _Groups | None] = WeakKeyDictionary()
_turn_angles: WeakKeyDictionary[TokenLine, _TurnAngles] = WeakKeyDictionary()
_angles: WeakKeyDictionary[Rotary | TokenLine, Tensor] = WeakKeyDictionary()
_seen: WeakKeyDictionary[TokenLine, _Seen] = WeakKeyDictionary()


def kernels_apply(device: torch.device) -> bool:
    """Return whether tensors on this device are worked on by the kernels."""
    return device.type == "cuda" and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def pack(codec: SiteCodec, x: Tensor) -> Tensor | None:
    """Return what codec.pack returns, or None; x: [batch, n_blocks * 32, n], the mean already subtracted."""
    if not kernels_apply(x.device) or not _is_packable(codec):
        return None
    from kvcompress.kernels.encode import project

    return _packed(codec, project(x, _dense_maps(codec).encoder))


def pack_heads(codec: SiteCodec, x: Tensor, rotary: Rotary | None, positions: Tensor | None) -> Tensor | None:
    """Return what codec.pack returns of x un-rotated and without the mean, or None.

    x: [batch, heads, n_blocks * 32, head_dim]; rotary: None where nothing is to be un-rotated; positions: those of
    TokenLine.key_positions.
    """
    whole = rotary is None or _whole_rotation(rotary, x.shape[3])
    if not (whole and kernels_apply(x.device) and _is_packable(codec)):
        return None
    from kvcompress.kernels.encode import centred, project

    return _packed(codec, project(centred(x, codec.mean, rotary, positions), _dense_maps(codec).encoder))


def _packed(codec: SiteCodec, latents: Tensor) -> Tensor:
    from kvcompress.kernels.encode import pack_latents

    dense = _dense_maps(codec)
    row = row_words(dense.counts, has_gain=codec.has_gain)
    batch, n_tokens, _ = latents.shape
    words = torch.empty(batch, n_tokens // BLOCK_TOKENS, row, dtype=torch.int32, device=latents.device)
    pack_latents(latents, _site(codec, words), tiles=codec.tiles)
    return words.view(torch.uint8)


def attention(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    """Return what tiled_attention returns, or None; the arguments are its own.

    Applies to a few query tokens over keys that are encoded after RoPE (or without it) or in turns, and coded values.
    Of a mask only what its last query sees is used: all queries see the same packed tokens, and recent ones causally.
    """
    codecs = layer.codecs
    if codecs.turn > 1:
        return _turned(layer, query, mask, scaling)
    batch, n_heads, n_queries, head_dim = query.shape
    if not kernels_apply(query.device) or n_heads * n_queries > _MOST_COLUMNS or n_queries > layer.keys.shape[2]:
        return None
    if codecs.key is None or codecs.value is None or codecs.key.mean is not None or query.dtype == torch.float32:
        return None
    if codecs.rotary is not None and not codecs.cached_rotated:
        return None
    if not (_is_packable(codecs.key) and _is_packable(codecs.value)):
        return None
    if codecs.rotated_mean is not None and not _whole_rotation(codecs.rotary, head_dim):
        return None
    from kvcompress.kernels.decode import packed_attention

    assert layer.packed_keys is not None and layer.packed_values is not None
    seen = _visible(layer, mask, batch)
    key_mean = codecs.rotated_mean
    return packed_attention(
        query,
        _site(codecs.key, layer.packed_keys.view(torch.int32), mean=key_mean),
        _site(codecs.value, layer.packed_values.view(torch.int32), mean=codecs.value.mean),
        first=seen.first,
        last=seen.last,
        n_blocks=layer.packed_keys.shape[1],
        exact=_exact(layer, seen.exact),
        scaling=scaling,
        mask=seen.packed,
        angles=None if key_mean is None else _layer_angles(layer),
    )


def _turned(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    codecs = layer.codecs
    batch, n_heads, n_queries, head_dim = query.shape
    if n_queries > _MOST_QUERIES or query.dtype == torch.float32 or codecs.turn % UNIT_TOKENS:
        return None
    if not n_queries <= layer.keys.shape[2] <= MOST_EXACT:
        return None
    if codecs.key is None or codecs.value is None or not _whole_rotation(codecs.rotary, head_dim):
        return None
    if not compiler_works(query.device):
        return None
    keys, values = (_grouped(codec, codecs.n_kv_heads) for codec in (codecs.key, codecs.value))
    if keys is None or values is None:
        return None
    if not applies(n_heads, codecs.n_kv_heads, head_dim, keys.layout, values.layout, query.device):
        return None
    assert layer.packed_keys is not None and layer.packed_values is not None
    seen = _visible(layer, mask, batch)
    exact, angles = _exact(layer, seen.exact), _angles_of_turns(layer)
    key_site = _grouped_site(codecs.key, keys, layer.packed_keys)
    value_site = _grouped_site(codecs.value, values, layer.packed_values)
    outputs = [
        turned_attention(
            query[:, :, i : i + 1],
            key_site,
            value_site,
            turn=codecs.turn,
            angles=angles,
            first=seen.first,
            last=seen.last,
            n_blocks=layer.packed_keys.shape[1],
            exact=_without_last(exact, n_queries - 1 - i),
            scaling=scaling,
            mask=seen.packed,
        )
        for i in range(n_queries)
    ]
    return outputs[0] if n_queries == 1 else torch.cat(outputs, 1)


def _without_last(exact: ExactTokens, n: int) -> ExactTokens:
    """Return all exact tokens but the last n, which come after a query."""
    if n == 0:
        return exact
    mask = None if exact.mask is None else exact.mask[:, :-n].contiguous()
    return replace(exact, keys=exact.keys[:, :, :-n], values=exact.values[:, :, :-n], mask=mask)


def _grouped(codec: SiteCodec, n_kv_heads: int) -> _Groups | None:
    """Return what the kernels for turns need of a codec, or None where its rows are not tiled."""
    if codec not in _groups:
        _groups[codec] = None
        bits = [b for b, first, last in codec.classes for _ in range(last - first)]
        n_groups = codec.encoder.shape[0]
        layout = group_layout(bits, codec.block, n_groups) if codec.tiles is not None else None
        if layout is not None and codec.tiles is not None and n_kv_heads % n_groups == 0:
            maps = head_decoders(_dense_maps(codec).decoder, layout, n_kv_heads)
            if codec.tiles.part == "key":
                maps = decoder_fragments(maps, layout.sets[0])
            # A part of a file's memory might lie anywhere: kernels read 16 bytes at a time.
            mean = None if codec.mean is None else codec.mean.clone()
            _groups[codec] = _Groups(replace(layout, table=layout.table.to(maps.device)), maps, mean)
    return _groups[codec]


def _grouped_site(codec: SiteCodec, groups: _Groups, packed: Tensor) -> GroupedSite:
    words = packed.view(torch.int32)
    gain_word = sum(bits * (last - first) for bits, first, last in codec.classes) if codec.has_gain else None
    return GroupedSite(words, groups.layout, groups.maps, groups.mean, gain_word)


def _angles_of_turns(layer: CompressedLayer) -> Tensor:
    """Return cos and sin at the first position of every turn, kept for all layers and steps of a cache."""
    tokens, rotary, turn = layer.tokens, layer.codecs.rotary, layer.codecs.turn
    assert rotary is not None and layer.packed_keys is not None
    n_turns = -(-layer.packed_keys.shape[1] * BLOCK_TOKENS // turn)
    known = _turn_angles.get(tokens)
    if known is None or known.origin is not tokens.origin or known.turn != turn or known.table.shape[1] < n_turns:
        n_turns = max(64, 1 << (n_turns - 1).bit_length())
        origin = tokens.origin.to(layer.keys.device)
        same = bool((origin == origin[0]).all())
        turns = torch.arange(n_turns, device=origin.device) * turn
        angles = (origin[:1] if same else origin)[:, None, None] + turns[:, None]
        angles = angles.float() * rotary.inv_freq.to(origin.device)
        table = torch.stack([angles.cos(), angles.sin()], -1) * rotary.scale
        known = _turn_angles[tokens] = _TurnAngles(tokens.origin, turn, table)
    return known.table


def _exact(layer: CompressedLayer, mask: Tensor) -> ExactTokens:
    keys, values = layer.keys, layer.values
    no_sinks = keys[:, :, :0]
    sink_keys = no_sinks if layer.sink_keys is None else layer.sink_keys
    sink_values = no_sinks if layer.sink_values is None else layer.sink_values
    return ExactTokens(keys, values, sink_keys, sink_values, mask)


def _visible(layer: CompressedLayer, mask: Tensor | None, batch: int) -> _Seen:
    """Return the masks of exact and packed tokens and the packed tokens [first, last) that count.

    The sinks' packed copies do not count. Worked out once a step: all layers of a step share it.
    """
    tokens, n_encoded, n_tokens = layer.tokens, layer.n_encoded, layer.get_seq_length()
    counters = tokens.counters
    if counters is not None:  # a fixed capacity: the device has counted, and nothing is made here
        return _Seen((batch, 0, 0), None, tokens.start, counters.visible, None, counters.first, counters.last)
    sizes = (batch, n_encoded, n_tokens)
    known = _seen.get(tokens)
    if known is not None and known.sizes == sizes and known.mask is mask and known.start is tokens.start:
        return known
    device = layer.keys.device
    sinks = tokens.sink_slots().to(device).expand(batch, -1)
    visible = torch.ones(batch, n_tokens, dtype=torch.bool, device=device)
    if mask is not None:
        row = mask[:, 0, -1, :n_tokens].expand(batch, -1)
        visible = row if row.dtype == torch.bool else row > torch.finfo(torch.float16).min
    sinks_seen = visible.gather(1, sinks.clamp(max=n_tokens - 1)) & (sinks < n_encoded)
    seen = _Seen(
        sizes,
        mask,
        tokens.start,
        exact=torch.cat([sinks_seen, visible[:, n_encoded:]], 1).to(torch.uint8),
        packed=None if mask is None else visible[:, :n_encoded].to(torch.uint8).contiguous(),
        first=(tokens.start.to(device) + sinks.shape[1]).to(torch.int32).expand(batch).contiguous(),
        last=torch.full((batch,), n_encoded, dtype=torch.int32, device=device),
    )
    _seen[tokens] = seen
    return seen


def _layer_angles(layer: CompressedLayer) -> Angles:
    rotary, device = layer.codecs.rotary, layer.keys.device
    assert rotary is not None and layer.packed_keys is not None
    n_tokens = layer.packed_keys.shape[1] * BLOCK_TOKENS
    # A recorded step reads its table for as long as its cache lives, whatever other caches come to need.
    owner = rotary if layer.tokens.counters is None else layer.tokens
    table = _angles.get(owner)
    if table is None or table.shape[0] < n_tokens or table.device != device:
        n_positions = max(4096, 1 << (n_tokens - 1).bit_length())
        table = angle_table(rotary.inv_freq.to(device), n_positions, scale=rotary.scale)
        _angles[owner] = table
    origin = layer.tokens.start.to(device, torch.int32).expand(layer.keys.shape[0]).contiguous()
    return Angles(table, origin)


def _whole_rotation(rotary: Rotary | None, head_dim: int) -> bool:
    return rotary is not None and 2 * len(rotary.inv_freq) == head_dim


def _is_packable(codec: SiteCodec) -> bool:
    return bool(codec.classes) and all(bits in LEVELS for bits, *_ in codec.classes)


def _dense_maps(codec: SiteCodec) -> _Dense:
    dense = _dense.get(codec)
    if dense is None:
        device = codec.encoder.device
        width = codec.encoder.shape[0] * codec.encoder.shape[2]
        encoder = codec.project(torch.eye(width, device=device)).T.contiguous()
        decoder = codec.decode(torch.eye(codec.n_components, device=device))
        counts = {bits: stop - start for bits, start, stop in codec.classes}
        dense = _dense[codec] = _Dense(encoder.half(), decoder.half(), counts)
    return dense


def _site(codec: SiteCodec, words: Tensor, *, mean: Tensor | None = None) -> PackedSite:
    dense = _dense_maps(codec)
    return PackedSite(words, dense.counts, dense.decoder, mean, codec.has_gain)
