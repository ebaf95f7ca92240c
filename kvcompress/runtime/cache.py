"""The compressed cache: latents of old tokens, exact sinks and an exact recent window, as a transformers Cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvcompress.plan import n_encoded
from kvcompress.rope import Rotary
from kvcompress.runtime.codec import SiteCodec


@dataclass(frozen=True)
class LayerCodecs:
    """How one layer's keys and values are stored. A codec of None stores that part exactly.

    `rotary` is None where keys are cached as they come (a basis that commutes with RoPE, or a layer without RoPE).
    """

    key: SiteCodec | None
    value: SiteCodec | None
    rotary: Rotary | None
    n_kv_heads: int
    head_dim: int

    @property
    def exact(self) -> bool:
        return self.key is None and self.value is None

    def encode_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """keys: [batch, heads, n_tokens, head_dim] after RoPE -> latents [batch, n_tokens, n_components]."""
        if self.rotary is not None:
            keys = self.rotary.unrotate(keys, positions)
        return _encode(self.key, keys)

    def encode_values(self, values: Tensor) -> Tensor:
        return _encode(self.value, values)

    def decode_keys(self, latents: Tensor, positions: Tensor) -> Tensor:
        """latents: [batch, n_tokens, n_components] -> rotated keys [batch, heads, n_tokens, head_dim], float32."""
        keys = self._decode(self.key, latents)
        return keys if self.rotary is None else self.rotary.rotate(keys, positions)

    def decode_values(self, latents: Tensor) -> Tensor:
        return self._decode(self.value, latents)

    def _decode(self, codec: SiteCodec | None, latents: Tensor) -> Tensor:
        x = latents.float() if codec is None else codec.decode(latents)
        return x.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2)


def _encode(codec: SiteCodec | None, x: Tensor) -> Tensor:
    """x: [batch, heads, n_tokens, head_dim] -> [batch, n_tokens, n_components]."""
    flat = x.transpose(1, 2).flatten(2)
    return flat.contiguous() if codec is None else codec.encode(flat)


class CompressedLayer(CacheLayerMixin):
    """One layer's cache. Tokens lie in order: `n_encoded` as latents, then the recent ones exactly.

    The sinks of a sequence (its first real tokens, so that left padding does not use them up) are encoded as well
    but kept exactly beside, and attention uses the exact copy.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, codecs: LayerCodecs, tokens: TokenLine) -> None:
        super().__init__()
        self.codecs, self.tokens = codecs, tokens
        self.key_latents: Tensor | None = None  # [batch, n_encoded, key components]
        self.value_latents: Tensor | None = None
        self.sink_keys: Tensor | None = None  # [batch, heads, sinks, head_dim]
        self.sink_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = self.keys if value_states is None else value_states[:, :, :0]
        self.is_initialized = True

    @property
    def n_encoded(self) -> int:
        return 0 if self.key_latents is None else self.key_latents.shape[1]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens exactly and return all exact ones; attention encodes the old ones when it is done."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def evict(self) -> None:
        """Encode whole blocks of tokens that have left the recent window."""
        n_leaving = self.tokens.n_encoded(self.get_seq_length()) - self.n_encoded
        if self.codecs.exact or n_leaving <= 0:
            return
        keys, values = self.keys[:, :, :n_leaving], self.values[:, :, :n_leaving]
        positions = self.tokens.positions[:, self.n_encoded : self.n_encoded + n_leaving]
        self._keep_sinks(keys, values)
        new = self.codecs.encode_keys(keys, positions), self.codecs.encode_values(values)
        if self.key_latents is None or self.value_latents is None:
            self.key_latents, self.value_latents = new
        else:
            self.key_latents = torch.cat([self.key_latents, new[0]], 1)
            self.value_latents = torch.cat([self.value_latents, new[1]], 1)
        # clone, so that the storage of the encoded tokens is freed
        self.keys, self.values = self.keys[:, :, n_leaving:].clone(), self.values[:, :, n_leaving:].clone()

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Copy the sinks among the leaving tokens; slots are counted from the first token of the cache."""
        slots = self.tokens.sink_slots()  # [batch, sinks]
        if self.sink_keys is None or self.sink_values is None:
            shape = (keys.shape[0], keys.shape[1], slots.shape[1])
            self.sink_keys = keys.new_zeros(*shape, keys.shape[3])
            self.sink_values = values.new_zeros(*shape, values.shape[3])
        place = slots - self.n_encoded
        leaving = ((place >= 0) & (place < keys.shape[2]))[:, None, :, None]
        place = place.clamp(0, keys.shape[2] - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.sink_keys = torch.where(leaving, keys.gather(2, place), self.sink_keys)
        self.sink_values = torch.where(leaving, values.gather(2, place), self.sink_values)

    def get_seq_length(self) -> int:
        return self.n_encoded + self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers before 5.3 passes the cache positions of the queries instead of their number
        n_queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + n_queries, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def crop(self, tokens: int) -> None:
        """Drop tokens from the end: `tokens` of them if negative, down to a length of `tokens` if positive."""
        if not self.is_initialized or tokens == 0:
            return
        length = self.get_seq_length()
        keep = min(length, length + tokens if tokens < 0 else tokens)
        n_encoded = min(self.n_encoded, keep)
        self.keys = self.keys[:, :, : keep - n_encoded].clone()
        self.values = self.values[:, :, : keep - n_encoded].clone()
        if self.key_latents is not None and self.value_latents is not None and n_encoded < self.n_encoded:
            self.key_latents = self.key_latents[:, :n_encoded].clone()
            self.value_latents = self.value_latents[:, :n_encoded].clone()

    def reset(self) -> None:
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]
        self.key_latents = self.value_latents = self.sink_keys = self.sink_values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def _map(self, change: Any) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, change(tensor))

    def _tensors(self) -> dict[str, Tensor]:
        names = ("keys", "values", "key_latents", "value_latents", "sink_keys", "sink_values")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def nbytes(self) -> int:
        """Bytes of the layer's storages, as allocated."""
        return sum(t.untyped_storage().nbytes() for t in self._tensors().values())


class TokenLine:
    """What all layers share: every token's position, and which tokens are sinks or old enough to be encoded."""

    def __init__(self, sinks: int, recent: int, encode_block: int, *, counts_bytes: bool) -> None:
        self.sinks, self.recent, self.encode_block, self.counts_bytes = sinks, recent, encode_block, counts_bytes
        self._positions: Tensor | None = None  # [batch, n_tokens], int32
        self._start = torch.zeros(1, dtype=torch.long)  # [batch], slot of each sequence's first real token

    @property
    def positions(self) -> Tensor:
        if self._positions is None:
            raise RuntimeError("the cache holds no tokens yet")
        return self._positions

    def append(self, positions: Tensor, batch: int) -> None:
        """positions: [batch or 1, n_new]."""
        new = positions.to(torch.int32).expand(batch, -1)
        if self._positions is None:
            # Left padding repeats position 0 or 1, so the first real token is the last one with position 0.
            is_start = (new == 0).flip(1)
            self._start = torch.where(is_start.any(1), new.shape[1] - 1 - is_start.int().argmax(1), 0)
            self._positions = new.clone()
        else:
            self._positions = torch.cat([self._positions, new], 1)

    def n_encoded(self, n_tokens: int) -> int:
        return n_encoded(n_tokens, self.recent, self.encode_block)

    def sink_slots(self) -> Tensor:
        """Return where each sequence's sinks lie, counted from the first token of the cache: [batch, sinks]."""
        return self._start[:, None] + torch.arange(self.sinks, device=self._start.device)

    def crop(self, length: int) -> None:
        self._positions = None if length == 0 else self.positions[:, :length].clone()

    def change_batch(self, function: Any) -> None:
        if self._positions is not None:
            self._positions, self._start = function(self._positions), function(self._start)

    def clear(self) -> None:
        self._positions = None

    def nbytes(self) -> int:
        counted = self._positions is not None and self.counts_bytes
        return self._positions.untyped_storage().nbytes() if counted and self._positions is not None else 0


class CompressedCache(Cache):
    """A transformers Cache whose layers store latents. Made by `attach`; `generate` uses it by itself."""

    def __init__(self, codecs: list[LayerCodecs], *, sinks: int, recent: int, encode_block: int) -> None:
        rebuilds_keys = any(c.rotary is not None and c.key is not None for c in codecs)
        self.tokens = TokenLine(sinks, recent, encode_block, counts_bytes=rebuilds_keys)
        super().__init__(layers=[CompressedLayer(c, self.tokens) for c in codecs])

    def nbytes(self) -> int:
        """Bytes of all storages: latents, sinks, window, and the positions where rebuilt keys need them."""
        return sum(layer.nbytes() for layer in self.layers) + self.tokens.nbytes()

    def crop(self, *args: int, **kwargs: int) -> None:
        super().crop(*args, **kwargs)
        self.tokens.crop(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.tokens.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.tokens.change_batch(lambda p: p.index_select(0, beam_idx.to(p.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.tokens.change_batch(lambda p: p.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.tokens.change_batch(lambda p: p[indices.to(p.device)])
