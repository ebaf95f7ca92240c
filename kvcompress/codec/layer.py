"""How one layer's keys and values are stored and read back; the reference, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.codec import SiteCodec
from kvcompress.model.rope import Rotary
from kvcompress.plan import BLOCK_TOKENS


@dataclass(frozen=True)
class LayerCodecs:
    """How one layer's keys and values are stored. A codec of None stores that part exactly.

    `rotary` is None where nothing is rotated: a layer without RoPE, or keys that are stored exactly. `cached_rotated`
    says that keys are encoded after RoPE (a basis that commutes with it); `rotated_mean` [n] is then their mean
    before RoPE, which turns with the position. `turn`: tokens whose keys are un-rotated by one position. `value_heads`,
    `value_dim`: of values, where they are not those of keys; `value_rotary`: of values that turn (the part of latent
    attention that does).

    Positions are those that keys are rotated by: of the first token of the turn.
    """

    key: SiteCodec | None
    value: SiteCodec | None
    rotary: Rotary | None
    n_kv_heads: int
    head_dim: int
    cached_rotated: bool = False
    rotated_mean: Tensor | None = None
    turn: int = 1
    value_heads: int | None = None
    value_dim: int | None = None
    value_rotary: Rotary | None = None

    @property
    def exact(self) -> bool:
        return self.key is None and self.value is None

    def pack_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """keys: [batch, heads, n_blocks * 32, head_dim] after RoPE -> [batch, n_blocks, size of a block]."""
        return self.pack(self.key, self.centred_keys(keys, positions))

    def pack_values(self, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """positions: as of pack_keys, needed where values turn."""
        return self.pack(self.value, self.centred_values(values, positions))

    def pack(self, codec: SiteCodec | None, x: Tensor) -> Tensor:
        """x: [batch, n_blocks * 32, n] -> [batch, n_blocks, size of a block]; an exact part keeps its dtype.

        codec: the layer's own of keys or of values; x: without its mean.
        """
        if codec is not None:
            return codec.pack(x)
        return x.reshape(x.shape[0], x.shape[1] // BLOCK_TOKENS, -1).contiguous()

    def unpack_keys(self, packed: Tensor) -> Tensor:
        """Return latents [batch, n_tokens, R], float32; the numbers themselves where keys are stored exactly."""
        return _unpack(self.key, packed)

    def unpack_values(self, packed: Tensor) -> Tensor:
        return _unpack(self.value, packed)

    def decode_keys(self, latents: Tensor, positions: Tensor) -> Tensor:
        """latents: [batch, n_tokens, R] -> rotated keys [batch, heads, n_tokens, head_dim], float32."""
        if self.key is None:
            return self._heads(latents)
        keys = self.key.decode(latents)
        if self.key.mean is not None:
            keys = keys + self.key.mean
        keys = self._heads(keys)
        if self.rotary is None:
            return keys
        if not self.cached_rotated:
            return self.rotary.rotate(keys, positions)
        return keys + self.mean_keys(positions)

    def decode_values(self, latents: Tensor, positions: Tensor | None = None) -> Tensor:
        if self.value is None:
            return self._value_heads(latents)
        values = self.value.decode(latents)
        values = self._value_heads(values if self.value.mean is None else values + self.value.mean)
        if self.value_rotary is None:
            return values
        assert positions is not None
        return self.value_rotary.rotate(values, positions)

    def roundtrip_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Return what attention sees of keys once they are encoded: [batch, heads, n_tokens, head_dim], float32."""
        if self.key is None:
            return keys.float()
        latents = self.key.latents(self.key.encode(self.centred_keys(keys, positions)))
        return self.decode_keys(latents, positions)

    def value_latents(self, values: Tensor) -> Tensor | None:
        """Return what is left of values once they are encoded, [batch, n_tokens, R]; None where they are kept whole."""
        return None if self.value is None else self.value.latents(self.value.encode(self.centred_values(values)))

    def mean_keys(self, positions: Tensor) -> Tensor:
        """Return the mean of keys cached rotated, at each position: [batch, heads, n_tokens, head_dim], or 0."""
        if self.rotated_mean is None or self.rotary is None:
            return torch.zeros((), device=positions.device)
        mean = self.rotated_mean.view(1, self.n_kv_heads, 1, self.head_dim)
        return self.rotary.rotate(mean.expand(len(positions), -1, positions.shape[1], -1), positions)

    def centred_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Return what the key codec encodes: un-rotated where it is to be, without the mean, [batch, n_tokens, n]."""
        if self.key is not None and self.rotary is not None:
            keys = keys - self.mean_keys(positions) if self.cached_rotated else self.rotary.unrotate(keys, positions)
        flat = keys.transpose(1, 2).flatten(2)
        return flat if self.key is None or self.key.mean is None else flat.float() - self.key.mean

    def centred_values(self, values: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return what the value codec encodes: un-rotated where it turns, without the mean, [batch, n_tokens, n]."""
        if self.value is not None and self.value_rotary is not None:
            assert positions is not None
            values = self.value_rotary.unrotate(values, positions)
        flat = values.transpose(1, 2).flatten(2)
        return flat if self.value is None or self.value.mean is None else flat.float() - self.value.mean

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2)

    @property
    def value_shape(self) -> tuple[int, int]:
        """(KV heads, numbers of each) of values."""
        return self.value_heads or self.n_kv_heads, self.value_dim or self.head_dim

    def _value_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.value_shape).transpose(1, 2)


def _unpack(codec: SiteCodec | None, packed: Tensor) -> Tensor:
    if codec is not None:
        return codec.unpack(packed)
    return packed.reshape(packed.shape[0], packed.shape[1] * BLOCK_TOKENS, -1).float()
