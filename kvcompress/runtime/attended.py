"""What all caches have in common that an attached model's attention goes through."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvcompress import compat
from kvcompress.runtime import calls
from kvcompress.runtime.places import Places, trimmed


class AttendedCache(compat.Cache):
    """A transformers Cache that learns what a forward brings, and whose layers hand themselves to attention."""

    places: Places

    @property
    def n_attending(self) -> int:
        """How many attentions of one forward go through a layer of this cache."""
        return self.places.n_attending

    def begin(self, positions: Tensor, batch: int, mask: Any) -> None:
        """Note the tokens that a forward brings, before any layer sees them; positions: [batch or 1, n_new]."""
        raise NotImplementedError

    def end(self) -> None:
        """Note that a forward has come to its end."""

    @calls.untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Let a layer take new keys and values, and hand it to the attention function that is called next."""
        call = calls.current()
        if call is not None and call.cache is self:
            if call.arriving is not None:
                arriving, call.arriving = call.arriving, None
                self.begin(arriving.positions, arriving.batch, arriving.mask)
            if layer_idx in self.places.layers:
                n_readers = self.places.readers[self.places.layers.index(layer_idx)]
                call.hand(self.layers[layer_idx], layer_idx, n_readers)
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.places.layers:
            trimmed(self.layers[layer_idx])
        return result
