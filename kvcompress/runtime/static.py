"""The compressed cache at fixed addresses: allocated once for a capacity, counted on the device.

A step of one token reads no number of the host that changes, so that a recorded one can be replayed; the host only
counts along, and encodes a block between two steps when the window is full. There is no left padding: a token's slot is
its position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.plan import BLOCK_TOKENS, n_encoded
from kvcompress.runtime.cache import CompressedCache, CompressedLayer
from kvcompress.runtime.counters import Counters
from kvcompress.runtime.tokens import TokenLine


class StaticLine(TokenLine):
    """What all layers share. `n_tokens` and `n_packed` are the host's copies of counters.length and counters.last."""

    def __init__(self, sinks: int, recent: int, capacity: int, n_seen: int) -> None:
        super().__init__(sinks, recent, counts_bytes=False)
        self.capacity, self.window, self.n_blocks = (
            capacity,
            recent + BLOCK_TOKENS,
            n_encoded(capacity, recent) // BLOCK_TOKENS,
        )
        self.n_tokens = self.n_packed = 0
        self.in_prefill = False
        self.ran_reference = False  # a step went through it: it reads the host's numbers and cannot be recorded
        self._n_seen = n_seen

    def begin_prefill(self, positions: Tensor, batch: int) -> None:
        """positions: [batch or 1, n_tokens]."""
        n_tokens, device = positions.shape[1], positions.device
        if self.counters is None:
            self.counters = Counters.make(batch, self.sinks, self.window, self._n_seen, device)
            self._start = torch.zeros(batch, dtype=torch.long, device=device)
            self._origin = torch.zeros(batch, dtype=torch.int32, device=device)
        self.n_tokens, self.n_packed = n_tokens, self.n_encoded(n_tokens)
        self.counters.length.fill_(self.n_tokens)
        self.counters.last.fill_(self.n_packed)

    def enlarge(self, capacity: int) -> None:
        """Make room for more tokens; the counters begin anew at the same numbers."""
        self.capacity, self.n_blocks = capacity, n_encoded(capacity, self.recent) // BLOCK_TOKENS
        self._n_seen = capacity if self._n_seen else 0
        old = self.counters
        if old is not None:
            new = Counters.make(len(old.last), self.sinks, self.window, self._n_seen, old.last.device)
            new.length.copy_(old.length)
            new.last.copy_(old.last)
            self.counters = new

    def count(self) -> None:
        """Count on the host a step that was replayed: the device has counted it itself."""
        self.n_tokens += 1

    def key_positions(self, first: int, stop: int, turn: int) -> Tensor:
        slots = torch.arange(first, stop, dtype=torch.int32, device=self._start.device)
        return (slots // turn * turn).expand(len(self._start), -1)

    def clear(self) -> None:
        self.n_tokens = self.n_packed = 0

    def nbytes(self) -> int:
        return 0 if self.counters is None else self.counters.nbytes()


class StaticLayer(CompressedLayer):
    """One layer's buffers. `keys`, `values`: [batch, heads, window, head_dim]; of the capacity where none is encoded.

    What lies beyond the counters is never seen, but must be finite: buffers begin as zeros.
    """

    is_croppable = False
    tokens: StaticLine

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, n_heads, _, head_dim = key_states.shape
        tokens, codecs = self.tokens, self.codecs

        def exact(n_tokens: int, batch: int = batch) -> Tensor:
            return key_states.new_zeros(batch, n_heads, n_tokens, head_dim)

        n_exact = tokens.capacity if codecs.exact else tokens.window
        self.keys, self.values = exact(n_exact), exact(n_exact)
        if not codecs.exact:
            self.sink_keys, self.sink_values = exact(tokens.sinks), exact(tokens.sinks)
            block = exact(BLOCK_TOKENS, batch=1)  # only to learn what one takes
            packed_keys = codecs.pack_keys(block, self.key_positions(0, BLOCK_TOKENS)[:1])
            size = (batch, max(1, tokens.n_blocks))
            self.packed_keys = packed_keys.new_zeros(*size, packed_keys.shape[2])
            packed_values = codecs.pack_values(block)
            self.packed_values = packed_values.new_zeros(*size, packed_values.shape[2])
        self.is_initialized = True

    @property
    def n_encoded(self) -> int:
        return 0 if self.codecs.exact else self.tokens.n_packed

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens where they belong; return those of a prompt as they are, in a step the whole buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = key_states.detach(), value_states.detach()
        if self.tokens.in_prefill:
            self._store_prompt(keys, values)
            return key_states, value_states
        counters = self.tokens.counters
        assert counters is not None
        slot = counters.newest if self.codecs.exact else counters.slot
        self.keys.index_copy_(2, slot, keys)
        self.values.index_copy_(2, slot, values)
        return self.keys, self.values

    def evict(self) -> None:
        """Nothing after a step: StaticCache.make_room evicts before one."""

    def evict_block(self) -> None:
        """Encode the oldest block of the window and move the rest of the window to its front."""
        if self.codecs.exact:
            return
        self._encode(self.keys[:, :, :BLOCK_TOKENS], self.values[:, :, :BLOCK_TOKENS], self.n_encoded)
        for buffer in (self.keys, self.values):
            rest = buffer[:, :, BLOCK_TOKENS:].clone()  # the two places overlap
            buffer[:, :, : rest.shape[2]] = rest

    def enlarge(self) -> None:
        """Take over what the buffers hold into those of the line's capacity, which has grown."""
        if not self.is_initialized:
            return
        held, n_exact = CompressedLayer(self.codecs, self.tokens), self.get_seq_length() - self.n_encoded
        held.keys, held.values = self.keys[:, :, :n_exact], self.values[:, :, :n_exact]
        held.packed_keys, held.packed_values = self.packed_keys, self.packed_values
        held.sink_keys, held.sink_values = self.sink_keys, self.sink_values
        self.copy_from(held)

    def filled(self) -> CompressedLayer:
        """Return a view of what is filled, as a layer for the reference."""
        view, n_blocks = CompressedLayer(self.codecs, self.tokens), self.n_encoded // BLOCK_TOKENS
        n_exact = self.get_seq_length() - self.n_encoded
        view.lazy_initialization(self.keys)
        view.keys, view.values = self.keys[:, :, :n_exact], self.values[:, :, :n_exact]
        if n_blocks and self.packed_keys is not None and self.packed_values is not None:
            view.packed_keys, view.packed_values = self.packed_keys[:, :n_blocks], self.packed_values[:, :n_blocks]
            view.sink_keys, view.sink_values = self.sink_keys, self.sink_values
        return view

    def copy_from(self, layer: CompressedLayer) -> None:
        """Take over what a growing layer holds; the line must have counted those tokens."""
        self.lazy_initialization(layer.keys)
        names = {"keys": 2, "values": 2, "packed_keys": 1, "packed_values": 1, "sink_keys": 2, "sink_values": 2}
        for name, dim in names.items():
            source = getattr(layer, name)
            if source is not None:
                getattr(self, name).narrow(dim, 0, source.shape[dim]).copy_(source)

    def _store_prompt(self, keys: Tensor, values: Tensor) -> None:
        n_leaving = self.n_encoded
        if n_leaving:
            self._encode(keys[:, :, :n_leaving], values[:, :, :n_leaving], 0)
        n_exact = keys.shape[2] - n_leaving
        self.keys[:, :, :n_exact] = keys[:, :, n_leaving:]
        self.values[:, :, :n_exact] = values[:, :, n_leaving:]

    def _encode(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Pack whole blocks of tokens, of which the first has the slot `first`, and copy the sinks among them."""
        assert self.packed_keys is not None and self.packed_values is not None
        assert self.sink_keys is not None and self.sink_values is not None
        stop = first + keys.shape[2]
        blocks = slice(first // BLOCK_TOKENS, stop // BLOCK_TOKENS)
        self.packed_keys[:, blocks] = self.codecs.pack_keys(keys, self.key_positions(first, stop))
        self.packed_values[:, blocks] = self.codecs.pack_values(values)
        last_sink = min(self.tokens.sinks, stop)
        if first < last_sink:
            self.sink_keys[:, :, first:last_sink] = keys[:, :, : last_sink - first]
            self.sink_values[:, :, first:last_sink] = values[:, :, : last_sink - first]

    @property
    def n_held(self) -> int:
        return self.tokens.n_tokens  # not what the buffers have room for: masks of a second prompt ask

    def get_seq_length(self) -> int:
        return self.tokens.n_tokens

    def get_max_length(self) -> int:
        return self.tokens.capacity

    def reset(self) -> None:
        """Keep the buffers: what they hold is not seen any more once the counters are back at 0."""

    def crop(self, tokens: int) -> None:
        raise _fixed("crop")

    def _map(self, change: Any) -> None:
        raise _fixed("change the batch of")


class StaticCache(CompressedCache):
    """A CompressedCache of a fixed capacity: a prompt, then one token of each sequence at a time.

    Allocated at the first prompt, for its batch; `reset` keeps the buffers for another. `nbytes` is what is allocated.
    """

    tokens: StaticLine

    def __init__(self, codecs: list[LayerKernels], *, sinks: int, recent: int, capacity: int) -> None:
        super().__init__(codecs, sinks=sinks, recent=recent)
        self.tokens = StaticLine(sinks, recent, capacity, capacity if any(c.exact for c in codecs) else 0)
        self.layers = [StaticLayer(c, self.tokens) for c in codecs]

    def begin(self, positions: Tensor, batch: int, mask: Any) -> None:
        """Count the tokens that a forward brings, before any layer is changed. Raises OptionError if it cannot be.

        mask: the caller's: None, [batch, n_tokens] or [batch, 1, n_queries, n_tokens]; nothing may be hidden.
        """
        tokens, n_new = self.tokens, positions.shape[1]
        tokens.in_prefill = tokens.n_tokens == 0
        known = tokens.counters
        if known is not None and len(known.last) != batch:
            raise OptionError(
                f"the cache was allocated for {len(known.last)} sequences, and here are {batch}: make another."
            )
        if tokens.in_prefill:
            self.check_capacity(n_new)
            _check_prompt(positions, mask)
            tokens.begin_prefill(positions, batch)
            return
        if n_new != 1 or _hides(mask):
            raise OptionError(
                f"after its prompt a cache of a fixed capacity takes one token at a time and no mask; here are {n_new} "
                f"tokens{' and a mask' if _hides(mask) else ''}. Use new_cache() without a capacity."
            )
        self.make_room()
        assert tokens.counters is not None
        tokens.counters.advance(tokens.sinks)
        tokens.count()

    def make_room(self) -> None:
        """Encode a block if the window is full. Raises OptionError, and changes nothing, if the capacity is reached."""
        tokens = self.tokens
        self.check_capacity(tokens.n_tokens + 1)
        if tokens.n_tokens - tokens.n_packed < tokens.window:
            return
        for layer in self.layers:
            layer.evict_block()
        assert tokens.counters is not None
        tokens.n_packed += BLOCK_TOKENS
        tokens.counters.last.add_(BLOCK_TOKENS)

    def enlarge(self, capacity: int) -> None:
        """Change the capacity to a larger one, at new addresses."""
        self.tokens.enlarge(capacity)
        for layer in self.layers:
            layer.enlarge()

    def check_capacity(self, n_tokens: int) -> None:
        """Raise OptionError unless there is room for n_tokens of a sequence in all."""
        if n_tokens > self.tokens.capacity:
            raise OptionError(
                f"the cache has room for {self.tokens.capacity} tokens of a sequence, and {n_tokens} are to be read. "
                "Make it with a larger capacity."
            )

    def crop(self, *args: int, **kwargs: int) -> None:
        raise _fixed("crop")


def _fixed(what: str) -> OptionError:
    return OptionError(f"cannot {what} a cache of a fixed capacity. Use new_cache() without one.")


def _check_prompt(positions: Tensor, mask: Any) -> None:
    """Raise OptionError for left padding, or a prompt of which the last token does not see everything."""
    if _hides(mask) or not bool((positions == torch.arange(positions.shape[1], device=positions.device)).all()):
        raise OptionError(
            "a cache of a fixed capacity takes no padding and no mask: all prompts of a batch must be of one length, "
            "at positions from 0 on. Use new_cache() without a capacity."
        )


def _hides(mask: Any) -> bool:
    """Return whether a caller's mask hides a token from the last query. One column, of a recorded step, never does."""
    if isinstance(mask, dict):  # one for each kind of layer
        return any(_hides(one) for one in mask.values())
    if not isinstance(mask, Tensor) or mask.shape[-1] == 1:
        return False
    row = mask if mask.dim() == 2 else mask[:, :, -1]
    seen = row > torch.finfo(torch.float16).min if row.is_floating_point() and row.dim() > 2 else row != 0
    return not bool(seen.all())
