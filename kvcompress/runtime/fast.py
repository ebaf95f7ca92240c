"""Attention over a layer's cache by the kernels: used by themselves on a GPU, the torch reference everywhere else.

`attention` returns None where the kernels do not apply, and the caller goes on with the reference.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcompress.kernels.arguments import ExactTokens
from kvcompress.kernels.site import kernels_apply, whole_rotation
from kvcompress.kernels.turned import MOST_EXACT, turned_attention
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.cache import CompressedLayer
from kvcompress.runtime.tokens import Visible

#: More (heads * query tokens) than this are a prompt: decoding tiles of keys and values is then cheaper.
_MOST_COLUMNS = 256
#: Of keys in turns, whose kernels take one query token at a time.
_MOST_QUERIES = 8


def attention(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    """Return what tiled_attention returns, or None; the arguments are its own.

    Applies to a few query tokens over keys that are encoded after RoPE (or without it) or in turns, and coded values.
    Of a mask only what its last query sees is used: all queries see the same packed tokens, and recent ones causally.
    """
    codecs = layer.codecs
    if layer.n_dropped:  # slots no longer count from the first token, which angle tables do
        return None
    if codecs.turn > 1:
        return _turned(layer, query, mask, scaling)
    batch, n_heads, n_queries, head_dim = query.shape
    if not kernels_apply(query.device) or n_heads * n_queries > _MOST_COLUMNS or n_queries > layer.keys.shape[2]:
        return None
    key_site, value_site = codecs.key_site, codecs.value_site
    if key_site is None or value_site is None or key_site.codec.mean is not None or query.dtype == torch.float32:
        return None
    if codecs.rotary is not None and not codecs.cached_rotated:
        return None
    if not (key_site.packable and value_site.packable):
        return None
    if codecs.rotated_mean is not None and not whole_rotation(codecs.rotary, head_dim):
        return None
    from kvcompress.kernels.decode import packed_attention

    assert layer.packed_keys is not None and layer.packed_values is not None
    seen = _visible(layer, mask, batch)
    key_mean, rotary = codecs.rotated_mean, codecs.rotary
    n_packed = layer.packed_keys.shape[1] * BLOCK_TOKENS
    angles = None
    if key_mean is not None and rotary is not None:
        angles = layer.tokens.angles(rotary, n_packed, layer.keys.shape[0], layer.keys.device)
    return packed_attention(
        query,
        key_site.site(layer.packed_keys.view(torch.int32), mean=key_mean),
        value_site.site(layer.packed_values.view(torch.int32), mean=value_site.codec.mean),
        first=seen.first,
        last=seen.last,
        n_blocks=layer.packed_keys.shape[1],
        exact=_exact(layer, seen.exact),
        scaling=scaling,
        mask=seen.packed,
        angles=angles,
    )


def _turned(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    codecs = layer.codecs
    batch, n_heads, n_queries, _ = query.shape
    if n_queries > _MOST_QUERIES or query.dtype == torch.float32:
        return None
    if not n_queries <= layer.keys.shape[2] <= MOST_EXACT:
        return None
    maps = codecs.turned_maps(n_heads, query.device)
    if maps is None:
        return None
    (keys, values), key_site, value_site, rotary = maps, codecs.key_site, codecs.value_site, codecs.rotary
    assert key_site is not None and value_site is not None and rotary is not None
    assert layer.packed_keys is not None and layer.packed_values is not None
    seen = _visible(layer, mask, batch)
    exact, n_blocks = _exact(layer, seen.exact), layer.packed_keys.shape[1]
    n_turns = -(-n_blocks * BLOCK_TOKENS // codecs.turn)
    angles = layer.tokens.turn_angles(rotary, codecs.turn, n_turns, layer.keys.device)
    grouped_keys = key_site.grouped_site(keys, layer.packed_keys)
    grouped_values = value_site.grouped_site(values, layer.packed_values)
    outputs = [
        turned_attention(
            query[:, :, i : i + 1],
            grouped_keys,
            grouped_values,
            turn=codecs.turn,
            angles=angles,
            first=seen.first,
            last=seen.last,
            n_blocks=n_blocks,
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


def _exact(layer: CompressedLayer, mask: Tensor) -> ExactTokens:
    keys, values = layer.keys, layer.values
    no_sinks = keys[:, :, :0]
    sink_keys = no_sinks if layer.sink_keys is None else layer.sink_keys
    sink_values = no_sinks if layer.sink_values is None else layer.sink_values
    return ExactTokens(keys, values, sink_keys, sink_values, mask)


def _visible(layer: CompressedLayer, mask: Tensor | None, batch: int) -> Visible:
    return layer.tokens.visible(
        mask, n_encoded=layer.n_encoded, n_tokens=layer.n_held, batch=batch, device=layer.keys.device
    )
