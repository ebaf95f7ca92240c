"""Attention over a compressed cache: a readable torch reference for CPU and GPU.

Two cases. A cache that holds no latents yet: the model's own scaled-dot-product attention on exact keys and values.
Packed codes: tile by tile with an online softmax, so that never more than one tile is unpacked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvcompress import compat
from kvcompress.codec.layer import LayerCodecs
from kvcompress.compat import sdpa_attention_forward
from kvcompress.errors import OptionError
from kvcompress.model.recording import capped, extras_of
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime import calls, fast
from kvcompress.runtime.cache import CompressedLayer
from kvcompress.runtime.simulation import SimulatedLayer, additive_mask, by_row, simulated_attention
from kvcompress.runtime.static import StaticLayer

#: Attributes that `attach` puts on attention modules: which layer of the cache one of a coded model reads; the codecs
#: of a folded one; the implementation that the model used before.
CODED, FOLDED_BY, OWN = "kvcompress_coded", "kvcompress_folded_by", "kvcompress_own"

#: Blocks of packed tokens decoded at once; at 8 KV heads of 128 a tile of float32 keys is 8 MB.
TILE_BLOCKS = 64


@calls.untraced
def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (output [batch, n_queries, heads, head_dim], None), as transformers' attention interface asks.

    query: [batch, heads, n_queries, head_dim]; key, value: what the cache's `update` returned. Registered under
    the name "kvcompress".
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer, is_last = _layer_of_call(module)
    extras = extras_of(kwargs)
    if extras and isinstance(layer, StaticLayer):
        raise OptionError(
            "the model caps its scores or has attention sinks as parameters, which a cache of a fixed capacity does "
            "not. Use new_cache() without a capacity."
        )
    if isinstance(layer, SimulatedLayer):
        return simulated_attention(layer, query, key, value, attention_mask, scaling, **extras), None
    virtual_heads: LayerCodecs | None = getattr(module, FOLDED_BY, None)
    if virtual_heads is not None:
        key, value = expand_virtual_heads(virtual_heads, key, value)
        calls.count_attention()
    if isinstance(layer, StaticLayer) and not layer.tokens.in_prefill:
        output = _static_attention(module, layer, query, scaling)
    elif layer is None or isinstance(layer, StaticLayer) or layer.n_encoded == 0:
        kwargs |= {"dropout": dropout, "scaling": scaling}
        kwargs["reads_cache"] = virtual_heads is not None or getattr(module, CODED, None) is not None
        output = compat.exact_attention(
            module, getattr(module, OWN, "sdpa"), query, key, value, attention_mask, **kwargs
        )
    else:
        fused = None if extras else fast.attention(layer, query, attention_mask, scaling)
        output = tiled_attention(layer, query, attention_mask, scaling, **extras) if fused is None else fused
    if layer is not None and is_last:
        layer.evict()
    return output, None


def _layer_of_call(module: nn.Module) -> tuple[Any, bool]:
    """Return the cache layer that this attention is over, or None where the forward leaves everything exact.

    And whether it is the last attention that reads it in this forward. Raises AttachmentError where it should be over
    one and is not: the model has passed the cache by.
    """
    call, place = calls.current(), getattr(module, CODED, None)
    layer, is_last = (None, True) if call is None else call.take(place)
    if layer is None and (call is None or call.cache is not None) and place is not None:
        raise compat.unproven(
            f"{type(module).__name__} attended without the compressed cache that is attached to its model"
        )
    return layer, is_last


def _static_attention(module: nn.Module, layer: StaticLayer, query: Tensor, scaling: float) -> Tensor:
    """Return attention of one new token of each sequence over a cache of a fixed capacity."""
    counters = layer.tokens.counters
    assert counters is not None
    if layer.codecs.exact:
        return sdpa_attention_forward(module, query, layer.keys, layer.values, counters.seen, scaling=scaling)[0]
    fused = fast.attention(layer, query, None, scaling)
    if fused is not None:
        return fused
    layer.tokens.ran_reference = True
    filled = layer.filled()
    if filled.n_encoded == 0:
        return sdpa_attention_forward(module, query, filled.keys, filled.values, None, scaling=scaling)[0]
    return tiled_attention(filled, query, None, scaling)


def expand_virtual_heads(codecs: LayerCodecs, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of all KV heads from cached virtual heads [batch, virtual heads, n_tokens, head_dim]."""

    def latents(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    full_key = key if codecs.key is None else codecs.decode_keys(latents(key), torch.empty(0)).to(key.dtype)
    full_value = value if codecs.value is None else codecs.decode_values(latents(value)).to(value.dtype)
    return full_key, full_value


class OnlineSoftmax:
    """Softmax-weighted sums over keys that arrive tile by tile (Milakov and Gimelshein, arXiv 1805.02867)."""

    def __init__(self, query: Tensor) -> None:
        """query: [batch, kv heads, rows, head_dim], float32; only its shape and device are used."""
        self.top = query.new_full(query.shape[:3], float("-inf"))
        self.total = query.new_zeros(query.shape[:3])
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, scores: Tensor, values: Tensor, into: str) -> None:
        """Add a tile. scores: [batch, kv heads, rows, t], -inf where masked.

        values: [batch, kv heads or 1, t, any width]; sums of different widths go into different names.
        """
        top = torch.maximum(self.top, scores.amax(-1))
        safe = top.masked_fill(top == float("-inf"), 0.0)  # a row that has seen no key yet
        shrink = (self.top - safe).exp()
        weights = (scores - safe.unsqueeze(-1)).exp()
        for name in self.sums:
            self.sums[name] *= shrink.unsqueeze(-1)
            self.weights[name] *= shrink
        self.sums[into] = self.sums.get(into, 0) + weights @ values
        self.weights[into] = self.weights.get(into, 0) + weights.sum(-1)
        self.total = self.total * shrink + weights.sum(-1)
        self.top = top

    def add_aside(self, scores: Tensor) -> None:
        """Add a score that takes weight from the others and brings no value: [batch, kv heads, groups, n_queries]."""
        scores = scores.flatten(2)
        top = torch.maximum(self.top, scores)
        self.total = self.total * (self.top - top).exp() + (scores - top).exp()
        self.top = top


def tiled_attention(
    layer: CompressedLayer,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Return attention over latents, sinks and recent tokens: [batch, n_queries, heads, width of values].

    query: [batch, heads, n_queries, head_dim]; mask: [batch, 1 or heads, n_queries, n_tokens], bool or additive, or
    None where every query sees every token. softcap, s_aux: see model.recording.plain_attention.
    """
    batch, n_heads, n_queries, head_dim = query.shape
    codecs, n_encoded, n_tokens = layer.codecs, layer.n_encoded, layer.n_held
    groups = n_heads // codecs.n_kv_heads
    rows = query.float().reshape(batch, codecs.n_kv_heads, groups * n_queries, head_dim) * scaling
    bias = additive_mask(mask, batch, n_queries, n_tokens, query.device)
    softmax = OnlineSoftmax(rows)
    if s_aux is not None:
        softmax.add_aside(s_aux.float().view(1, codecs.n_kv_heads, groups, 1).expand(batch, -1, -1, n_queries))

    def exact_scores(keys: Tensor, part: Tensor) -> Tensor:
        scores = capped(rows @ keys.float().transpose(-1, -2), softcap)
        return scores + by_row(part, codecs.n_kv_heads, groups)

    # Decoding a tile costs n_tokens * n * R, working in the latent heads * n_queries * R: take the cheaper.
    few_queries = n_heads * n_queries <= codecs.n_kv_heads * head_dim
    in_latent = codecs.value is not None and few_queries
    absorbed = _absorbed(codecs, rows) if few_queries else None
    in_turns = codecs.turn > 1 and layer.n_dropped % codecs.turn == 0  # tiles begin where turns do
    by_turn = few_queries and in_turns and codecs.turn >= n_heads * n_queries  # absorbing once a turn costs less, too
    assert layer.packed_keys is not None and layer.packed_values is not None  # n_encoded > 0
    sink_slots = layer.tokens.sink_slots().to(query.device)
    old_bias = bias[..., :n_encoded].clone()
    in_cache = sink_slots.clamp(0, n_encoded - 1)[:, None, None].expand(-1, old_bias.shape[1], n_queries, -1)
    is_encoded = ((sink_slots >= 0) & (sink_slots < n_encoded))[:, None, None]
    if sink_slots.numel():
        sink_bias = old_bias.gather(-1, in_cache).masked_fill(~is_encoded, float("-inf"))
        old_bias = _mask_slots(old_bias, in_cache, is_encoded)
        softmax.add(exact_scores(layer.sink_keys, sink_bias), layer.sink_values.float(), "exact")  # type: ignore[arg-type, union-attr]
    for block in range(0, layer.packed_keys.shape[1], TILE_BLOCKS):
        tile = slice(block, block + TILE_BLOCKS)
        tokens = slice(block * BLOCK_TOKENS, min((block + TILE_BLOCKS) * BLOCK_TOKENS, n_encoded))
        positions = layer.key_positions(tokens.start, tokens.stop)
        key_latents = codecs.unpack_keys(layer.packed_keys[:, tile])
        if absorbed is not None:
            scores = absorbed @ key_latents.unsqueeze(1).transpose(-1, -2)
            if codecs.rotated_mean is not None:
                scores = scores + rows @ codecs.mean_keys(positions).transpose(-1, -2)
        elif by_turn:
            scores = _turn_scores(codecs, rows, key_latents, positions)
        else:
            scores = rows @ codecs.decode_keys(key_latents, positions).transpose(-1, -2)
        scores = capped(scores, softcap) + by_row(old_bias[..., tokens], codecs.n_kv_heads, groups)
        latents = codecs.unpack_values(layer.packed_values[:, tile])
        values = latents.unsqueeze(1) if in_latent else codecs.decode_values(latents)
        softmax.add(scores, values, "latent" if in_latent else "exact")
    if layer.keys.shape[2]:
        softmax.add(exact_scores(layer.keys, bias[..., n_encoded:]), layer.values.float(), "exact")
    output = softmax.sums.get("exact", rows.new_zeros(*rows.shape[:3], codecs.value_shape[1]))
    if in_latent:
        output = output + _decode_sums(codecs, softmax.sums["latent"], softmax.weights["latent"])
    output = output / softmax.total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return output.reshape(batch, n_heads, n_queries, -1).transpose(1, 2).to(query.dtype).contiguous()


def _absorbed(codecs: LayerCodecs, rows: Tensor) -> Tensor | None:
    """Return queries that score key latents directly, [batch, kv heads, rows, R], where the basis allows it.

    It does where keys are encoded after RoPE, or in a layer without it. rows: [batch, kv heads, rows, head_dim].
    """
    if codecs.key is None or codecs.key.mean is not None or (codecs.rotary is not None and not codecs.cached_rotated):
        return None
    # each query sees its own KV head only: [batch, kv heads, rows, kv heads, head_dim]
    own = torch.eye(codecs.n_kv_heads, device=rows.device)[:, None, :, None] * rows.unsqueeze(3)
    return codecs.key.absorb(own.flatten(3))


def _turn_scores(codecs: LayerCodecs, rows: Tensor, latents: Tensor, positions: Tensor) -> Tensor:
    """Return the scores of a tile of keys that are un-rotated by turns, none rebuilt: [batch, kv heads, rows, t].

    q . R_c (D z + m) = (D^T R_-c q) . z + (R_-c q) . m: absorbed once for each turn, which begins at position c.
    rows: [batch, kv heads, rows, head_dim]; latents: [batch, t, R]; positions: [batch, t], those of the turns.
    """
    assert codecs.key is not None and codecs.rotary is not None
    n_tokens, (_, n_kv_heads, n_rows, head_dim) = latents.shape[1], rows.shape
    length = math.gcd(codecs.turn, TILE_BLOCKS * BLOCK_TOKENS)  # tiles begin and end at whole parts of this length
    first = positions[:, ::length]  # [batch, n_parts]
    n_parts = first.shape[1]
    turned = codecs.rotary.rotate(rows.flatten(1, 2).unsqueeze(2).expand(-1, -1, n_parts, -1), -first)
    turned = turned.unflatten(1, (n_kv_heads, n_rows)).flatten(2, 3)  # [batch, kv heads, rows * n_parts, head_dim]
    own = codecs.key.dense_decoder.view(-1, n_kv_heads, head_dim).permute(1, 2, 0)  # [kv heads, head_dim, R]
    absorbed = (turned @ own).unflatten(2, (n_rows, n_parts)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    parts = functional.pad(latents, (0, 0, 0, -n_tokens % length)).unflatten(1, (n_parts, length))
    scores = absorbed @ parts.transpose(2, 3)  # [batch, n_parts, kv heads * rows, length]
    scores = scores.unflatten(2, (n_kv_heads, n_rows)).permute(0, 2, 3, 1, 4)
    if codecs.key.mean is not None:
        of_mean = turned @ codecs.key.mean.view(n_kv_heads, head_dim, 1)
        scores = scores + of_mean.unflatten(2, (n_rows, n_parts))
    return scores.flatten(3)[..., :n_tokens]


def _decode_sums(codecs: LayerCodecs, sums: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i w_i x^_i [batch, kv heads, rows, head_dim] from sum_i w_i z_i [..., R] and sum_i w_i."""
    assert codecs.value is not None
    decoded = codecs.value.decode(sums)
    if codecs.value.mean is not None:
        decoded = decoded + weights.unsqueeze(-1) * codecs.value.mean
    # [batch, kv heads, rows, kv heads, head_dim]: of each head's rows only its own head is wanted
    per_head = decoded.unflatten(-1, codecs.value_shape)
    return per_head.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _mask_slots(bias: Tensor, slots: Tensor, which: Tensor) -> Tensor:
    """Set bias to -inf at `slots` where `which` holds; a slot may be named more than once."""
    current = bias.gather(-1, slots)
    return bias.scatter_reduce(-1, slots, torch.where(which, float("-inf"), current), "amin")
