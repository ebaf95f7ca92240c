"""What all layers of a cache share: every token's position, which are sinks, which are encoded, which are seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.arguments import Angles, angle_table
from kvcompress.model.rope import Rotary
from kvcompress.plan import n_dropped, n_encoded
from kvcompress.runtime.counters import Counters


@dataclass(frozen=True, slots=True)
class Visible:
    """The masks of one step, and what they were made for; see TokenLine.visible."""

    sizes: tuple[int, int, int]
    mask: Tensor | None
    start: Tensor
    exact: Tensor
    packed: Tensor | None
    first: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class _TurnAngles:
    """table: cos and sin at the first position of each turn, [1 or batch, turns, rotary_dim / 2, 2]; and of what."""

    rotary: Rotary
    origin: Tensor
    turn: int
    table: Tensor


class TokenLine:
    """What all layers share: every token's position, and which tokens are sinks or old enough to be encoded."""

    counters: Counters | None = None  # of a cache of a fixed capacity

    def __init__(self, sinks: int, recent: int, *, counts_bytes: bool, sliding_window: int | None = None) -> None:
        """sliding_window: that of every layer, if all have one: what has left it is dropped; slots count from there."""
        self.sinks, self.recent, self.counts_bytes = sinks, recent, counts_bytes
        self.sliding_window, self.dropped = sliding_window, 0
        self._positions: Tensor | None = None  # [batch, n_tokens], int32
        self._start = torch.zeros(1, dtype=torch.long)  # [batch], slot of each sequence's first real token
        self._origin = torch.zeros(1, dtype=torch.int32)  # [batch], the position of slot 0, counted back from there
        self._visible: Visible | None = None  # of the latest step
        self._turn_angles: dict[int, _TurnAngles] = {}  # by the id of the rotary, which they keep
        self._angles: dict[int, tuple[Rotary, Tensor]] = {}

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
            self._origin = (new.gather(1, self._start[:, None])[:, 0] - self._start).to(torch.int32)
            self._positions = new.clone()
        else:
            self._positions = torch.cat([self._positions, new], 1)

    def drop(self) -> None:
        """Drop what all layers have dropped, at the end of a forward."""
        n = 0 if self._positions is None else self.n_dropped(self.dropped + self._positions.shape[1]) - self.dropped
        if n > 0 and self._positions is not None:
            self._positions = self._positions[:, n:].clone()
            self._start, self._origin = self._start - n, self._origin + n
            self.dropped += n

    def n_encoded(self, n_tokens: int) -> int:
        """Return how many of all tokens that came are encoded by now, those since dropped included."""
        return n_encoded(n_tokens, self.recent)

    def n_dropped(self, n_tokens: int) -> int:
        """Return how many of all tokens that came are dropped by now."""
        return n_dropped(n_tokens, self.n_encoded(n_tokens), self.sliding_window)

    def sinks_are_gone(self, n_dropped: int) -> bool:
        """Return whether the sinks of every sequence are among the first n_dropped tokens."""
        return n_dropped > 0 and bool((self._start + self.dropped + self.sinks <= n_dropped).all())

    def key_positions(self, first: int, stop: int, turn: int) -> Tensor:
        """Return the position of the first token of the turn of each slot in first..stop: [batch, stop - first].

        Turns are aligned on slots, those of dropped tokens included. One that begins inside the left padding begins at
        a negative position, counted back from the first real token, so that what a turn's position is never depends on
        the padding's own.
        """
        if turn == 1:
            return self.positions[:, first:stop]
        slots = torch.arange(first, stop, dtype=torch.int32, device=self.positions.device)
        phase = self.dropped % turn
        return self._origin[:, None] + (slots + phase) // turn * turn - phase

    @property
    def start(self) -> Tensor:
        """The slot of each sequence's first real token: [batch], or [1] before there are tokens."""
        return self._start

    @property
    def origin(self) -> Tensor:
        """The position of slot 0 of each sequence, counted back from its first real token: [batch], int32."""
        return self._origin

    def sink_slots(self) -> Tensor:
        """Return where each sequence's sinks lie, counted from the first token of the cache: [batch, sinks].

        Below 0: dropped; none are named once all are.
        """
        if self.sinks_are_gone(self.dropped):
            return self._start.new_zeros(len(self._start), 0)
        return self._start[:, None] + torch.arange(self.sinks, device=self._start.device)

    def crop(self, length: int) -> None:
        if self.dropped and length < self.dropped + self.positions.shape[1]:
            raise OptionError("tokens have left the model's sliding window: the cache cannot go back to before that.")
        self._positions = None if length == 0 else self.positions[:, :length].clone()

    def change_batch(self, function: Any) -> None:
        if self._positions is not None:
            self._positions = function(self._positions)
            self._start, self._origin = function(self._start), function(self._origin)

    def clear(self) -> None:
        self._positions, self.dropped = None, 0

    def nbytes(self) -> int:
        counted = self._positions is not None and self.counts_bytes
        return self._positions.untyped_storage().nbytes() if counted and self._positions is not None else 0

    def visible(
        self, mask: Tensor | None, *, n_encoded: int, n_tokens: int, batch: int, device: torch.device
    ) -> Visible:
        """Return which exact and packed tokens count, and the packed tokens [first, last) among which those lie.

        mask: of the step, [batch, 1, n_queries, n_tokens], or None; what its last query sees is used. The sinks' packed
        copies do not count. Worked out once a step: all layers of a step share it.
        """
        counters = self.counters
        if counters is not None:  # a fixed capacity: the device has counted, and nothing is made here
            return Visible((batch, 0, 0), None, self.start, counters.visible, None, counters.first, counters.last)
        sizes = (batch, n_encoded, n_tokens)
        known = self._visible
        same = known is not None and (known.sizes, known.exact.device) == (sizes, device)
        if known is not None and same and known.mask is mask and known.start is self.start:
            return known
        sinks = self.sink_slots().to(device).expand(batch, -1)
        visible = torch.ones(batch, n_tokens, dtype=torch.bool, device=device)
        if mask is not None:
            row = mask[:, 0, -1, :n_tokens].expand(batch, -1)
            visible = row if row.dtype == torch.bool else row > torch.finfo(torch.float16).min
        sinks_seen = visible.gather(1, sinks.clamp(0, n_tokens - 1)) & (sinks >= 0) & (sinks < n_encoded)
        self._visible = Visible(
            sizes,
            mask,
            self.start,
            exact=torch.cat([sinks_seen, visible[:, n_encoded:]], 1).to(torch.uint8),
            packed=None if mask is None else visible[:, :n_encoded].to(torch.uint8).contiguous(),
            first=(self.start.to(device) + sinks.shape[1]).clamp_min(0).to(torch.int32).expand(batch).contiguous(),
            last=torch.full((batch,), n_encoded, dtype=torch.int32, device=device),
        )
        return self._visible

    def turn_angles(self, rotary: Rotary, turn: int, n_turns: int, device: torch.device) -> Tensor:
        """Return cos and sin at the first position of at least n_turns turns: [1 or batch, turns, rotary_dim / 2, 2].

        Kept for all layers and steps of a cache.
        """
        known = self._turn_angles.get(id(rotary))
        fits = known is not None and known.origin is self.origin and known.turn == turn
        if known is None or not fits or known.table.shape[1] < n_turns or known.table.device != device:
            n_turns = max(64, 1 << (n_turns - 1).bit_length())
            origin = self.origin.to(device)
            same = bool((origin == origin[0]).all())
            turns = torch.arange(n_turns, device=device) * turn
            angles = (origin[:1] if same else origin)[:, None, None] + turns[:, None]
            angles = angles.float() * rotary.inv_freq.to(device)
            table = torch.stack([angles.cos(), angles.sin()], -1) * rotary.scale
            known = self._turn_angles[id(rotary)] = _TurnAngles(rotary, self.origin, turn, table)
        return known.table

    def angles(self, rotary: Rotary, n_tokens: int, batch: int, device: torch.device) -> Angles:
        """Return the angles of at least the first n_tokens positions, kept for all layers and steps of a cache."""
        _, table = self._angles.get(id(rotary), (rotary, None))
        if table is None or table.shape[0] < n_tokens or table.device != device:
            n_positions = max(4096, 1 << (n_tokens - 1).bit_length())
            table = angle_table(rotary.inv_freq.to(device), n_positions, scale=rotary.scale)
            self._angles[id(rotary)] = rotary, table
        origin = self.start.to(device, torch.int32).expand(batch).contiguous()
        return Angles(table, origin)
