"""The compressed cache: packed codes of old tokens, exact sinks and an exact recent window, as a transformers Cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attended import AttendedCache
from kvcompress.runtime.growing import Grown, append
from kvcompress.runtime.places import Places, own_nbytes
from kvcompress.runtime.tokens import TokenLine


class CompressedLayer(compat.CacheLayer):
    """One layer's cache. Tokens lie in order: `n_encoded` packed in blocks of 32, then the recent ones exactly.

    Where every layer of the model has a sliding window, `n_dropped` have left it; what is held counts from there on.

    The sinks of a sequence (its first real tokens, so that left padding does not use them up) are encoded as well
    but kept exactly beside, and attention uses the exact copy.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    keys, values = Grown(2), Grown(2)  # [batch, heads, n_tokens - n_encoded, head_dim]
    packed_keys, packed_values = Grown(1), Grown(1)  # [batch, n_encoded / 32, size of a block]

    def __init__(self, codecs: LayerKernels, tokens: TokenLine) -> None:
        super().__init__()
        self.codecs, self.tokens, self.n_dropped = codecs, tokens, 0
        self.packed_keys = self.packed_values = None
        self.sink_keys: Tensor | None = None  # [batch, heads, sinks, head_dim]
        self.sink_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = self.keys if value_states is None else value_states[:, :, :0]
        self.is_initialized = True

    @property
    def n_encoded(self) -> int:
        return 0 if self.packed_keys is None else self.packed_keys.shape[1] * BLOCK_TOKENS

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens exactly and return all exact ones; attention encodes the old ones when it is done."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.codecs.exact and self.keys.shape[2]:  # grows for ever; the window of the others is short
            append(self, CompressedLayer.keys, key_states, step=BLOCK_TOKENS)
            append(self, CompressedLayer.values, value_states, step=BLOCK_TOKENS)
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def evict(self) -> None:
        """Encode whole blocks of tokens that have left the recent window; drop those that have left the model's own."""
        n_leaving = self.tokens.n_encoded(self.get_seq_length()) - self.n_encoded - self.n_dropped
        if n_leaving > 0 and not self.codecs.exact:
            self._encode_oldest(n_leaving)
        n_dead = self.tokens.n_dropped(self.get_seq_length()) - self.n_dropped
        if n_dead > 0:
            self._drop(n_dead)

    def _encode_oldest(self, n_leaving: int) -> None:
        keys, values = self.keys[:, :, :n_leaving], self.values[:, :, :n_leaving]
        positions = self.key_positions(self.n_encoded, self.n_encoded + n_leaving)
        self._keep_sinks(keys, values)
        append(self, CompressedLayer.packed_keys, self.codecs.pack_keys(keys, positions))
        append(self, CompressedLayer.packed_values, self.codecs.pack_values(values, positions))
        # clone, so that the storage of the encoded tokens is freed
        self.keys, self.values = self.keys[:, :, n_leaving:].clone(), self.values[:, :, n_leaving:].clone()

    def _drop(self, n: int) -> None:
        self.n_dropped += n
        if self.packed_keys is None or self.packed_values is None:
            self.keys, self.values = self.keys[:, :, n:].clone(), self.values[:, :, n:].clone()
            return
        self.packed_keys = self.packed_keys[:, n // BLOCK_TOKENS :].clone()
        self.packed_values = self.packed_values[:, n // BLOCK_TOKENS :].clone()
        if self.tokens.sinks_are_gone(self.n_dropped) and self.sink_keys is not None and self.sink_values is not None:
            self.sink_keys, self.sink_values = self.sink_keys[:, :, :0].clone(), self.sink_values[:, :, :0].clone()

    def key_positions(self, first: int, stop: int) -> Tensor:
        """Return the positions by which the layer's keys of slots first..stop are un-rotated: [batch, stop - first]."""
        return self.tokens.key_positions(first, stop, self.codecs.turn).to(self.device)

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Copy the sinks among the leaving tokens; slots are counted from the first token of the cache."""
        slots = self.tokens.sink_slots().to(keys.device)  # [batch, sinks]
        if self.sink_keys is None or self.sink_values is None:
            self.sink_keys, self.sink_values = (
                x.new_zeros(x.shape[0], x.shape[1], slots.shape[1], x.shape[3]) for x in (keys, values)
            )
        place = slots - self.n_encoded
        leaving = ((place >= 0) & (place < keys.shape[2]))[:, None, :, None]
        place = place.clamp(0, keys.shape[2] - 1)
        self.sink_keys = torch.where(leaving, _gathered(keys, place), self.sink_keys)
        self.sink_values = torch.where(leaving, _gathered(values, place), self.sink_values)

    def get_seq_length(self) -> int:
        return self.n_dropped + self.n_held if self.is_initialized else 0

    @property
    def n_held(self) -> int:
        """Tokens that are held, encoded or exact."""
        return self.n_encoded + self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        held = self.n_held if self.is_initialized else 0
        return held + compat.n_queries(query_length), self.n_dropped

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens: int) -> None:
        """Drop tokens from the end: `tokens` of them if negative, down to a length of `tokens` if positive."""
        if not self.is_initialized or tokens == 0:
            return
        if self.n_dropped:
            raise OptionError("tokens have left the model's sliding window: the cache cannot go back to before that.")
        length = self.get_seq_length()
        keep = min(length, length + tokens if tokens < 0 else tokens)
        if keep >= self.n_encoded:
            self.keys = self.keys[:, :, : keep - self.n_encoded].clone()
            self.values = self.values[:, :, : keep - self.n_encoded].clone()
        elif self.packed_keys is not None and self.packed_values is not None:
            whole = keep // BLOCK_TOKENS
            self.keys, self.values = self.rebuilt(whole, keep - whole * BLOCK_TOKENS)
            self.packed_keys = self.packed_keys[:, :whole].clone()
            self.packed_values = self.packed_values[:, :whole].clone()

    def rebuilt(self, block: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of n_tokens from a packed block on, sinks exact: [batch, heads, n_tokens, head_dim].

        Encoding them again gives the same codes, up to rounding.
        """
        assert self.packed_keys is not None and self.packed_values is not None
        first, blocks = block * BLOCK_TOKENS, slice(block, block + -(-n_tokens // BLOCK_TOKENS))
        positions = self.key_positions(first, first + n_tokens)
        latents = self.codecs.unpack_keys(self.packed_keys[:, blocks])[:, :n_tokens]
        keys = self.codecs.decode_keys(latents, positions).to(self.dtype)
        latents = self.codecs.unpack_values(self.packed_values[:, blocks])[:, :n_tokens]
        values = self.codecs.decode_values(latents, positions).to(self.dtype)
        if self.sink_keys is not None and self.sink_values is not None and n_tokens:
            place = torch.arange(first, first + n_tokens, device=keys.device)
            sink = self.tokens.sink_slots().to(keys.device)[:, None, :] == place[None, :, None]  # [batch, token, sink]
            exact = sink.any(-1)[:, None, :, None]
            if sink.shape[-1]:
                choose = sink.int().argmax(-1)
                keys = torch.where(exact, _gathered(self.sink_keys, choose), keys)
                values = torch.where(exact, _gathered(self.sink_values, choose), values)
        return keys.contiguous(), values.contiguous()

    def reset(self) -> None:
        self.is_initialized, self.n_dropped = False, 0
        self.keys = self.values = None
        self.packed_keys = self.packed_values = self.sink_keys = self.sink_values = None

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
        names = ("keys", "values", "packed_keys", "packed_values", "sink_keys", "sink_values")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def nbytes(self) -> int:
        """Bytes of the layer's storages, as allocated: with the room in which it grows."""
        return sum(t.untyped_storage().nbytes() for t in self._tensors().values())

    def room_bytes(self) -> int:
        """Bytes among nbytes() that wait for tokens to come: at most an eighth of what grows."""
        kind = type(self)
        growing = [a.growing(self) for a in (kind.keys, kind.values, kind.packed_keys, kind.packed_values)]
        return sum(g.room_bytes for g in growing if g is not None)


class RebuiltLayer(CompressedLayer):
    """A layer whose model works on what the cache returns before it attends: it gets all tokens, the old ones rebuilt.

    Only the codes stay; what is rebuilt lives as long as the layer's attention.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        if self.n_encoded:
            old_keys, old_values = self.rebuilt(0, self.n_encoded)
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        self.evict()
        return keys, values


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """x: [batch, heads, n_tokens, width]; tokens: [batch, n] -> those tokens, [batch, heads, n, width]."""
    return x.gather(2, tokens.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class CompressedCache(AttendedCache):
    """A transformers Cache whose layers store packed codes. Made by `attach`; `generate` uses it by itself."""

    def __init__(
        self,
        codecs: list[LayerKernels],
        *,
        sinks: int,
        recent: int,
        places: Places | None = None,
        window: int | None = None,
    ) -> None:
        """places: where the codecs' layers stand among the model's own, by default everywhere. window: of each."""
        self.places = places or Places.all_of(len(codecs))
        needs_positions = any(c.key is not None for c in codecs)
        self.tokens = tokens = TokenLine(sinks, recent, counts_bytes=needs_positions, sliding_window=window)
        kinds = [CompressedLayer if n else RebuiltLayer for n in self.places.readers]
        make = [partial(kind, c, tokens) for kind, c in zip(kinds, codecs, strict=True)]
        super().__init__(layers=self.places.filled(make))

    def begin(self, positions: Tensor, batch: int, mask: Any) -> None:
        self.tokens.append(positions, batch)

    def end(self) -> None:
        self.tokens.drop()

    def nbytes(self) -> int:
        """Bytes of all storages: codes, sinks, window, room to grow, positions where keys are encoded, own layers."""
        compressed = sum(x.nbytes() for x in self.layers if isinstance(x, CompressedLayer))
        return compressed + sum(own_nbytes(x) for x in self.layers) + self.tokens.nbytes()

    def room_bytes(self) -> int:
        """Bytes among nbytes() in which the cache grows: none after a prompt, at most an eighth later on."""
        layers = [x for x in self.layers if isinstance(x, CompressedLayer)]
        return sum(x.room_bytes() for x in layers)

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
