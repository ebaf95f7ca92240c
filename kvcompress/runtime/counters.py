"""What a cache of a fixed capacity counts on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Counters:
    """What changes from step to step of a cache of a fixed capacity, on the device, at addresses that stay.

    length: [1] int64, tokens read. last: [batch] int32, those of them that are encoded. newest, slot: [1] int64, where
    the newest token lies among all tokens, and in the window. visible: [batch, sinks + window] uint8, the exact tokens
    that count. seen: [1, 1, 1, capacity] bool, the tokens read; of no token where every layer encodes.
    Constant: first: [batch] int32, the number of sinks; order: int32, 0, 1, 2, ...
    """

    length: Tensor
    last: Tensor
    newest: Tensor
    slot: Tensor
    visible: Tensor
    seen: Tensor
    first: Tensor
    order: Tensor

    @classmethod
    def make(cls, batch: int, n_sinks: int, n_window: int, n_seen: int, device: torch.device) -> Counters:
        one, each = (
            torch.zeros(1, dtype=torch.long, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )
        return cls(
            length=one,
            last=each,
            newest=one.clone(),
            slot=one.clone(),
            visible=torch.zeros(batch, n_sinks + n_window, dtype=torch.uint8, device=device),
            seen=torch.zeros(1, 1, 1, n_seen, dtype=torch.bool, device=device),
            first=each + n_sinks,
            order=torch.arange(max(n_sinks + n_window, n_seen), dtype=torch.int32, device=device),
        )

    def advance(self, n_sinks: int) -> None:
        """Count one more token of each sequence. Nothing here depends on numbers of the host that change."""
        sinks, window = self.visible[:, :n_sinks], self.visible[:, n_sinks:]
        self.newest.copy_(self.length)
        self.slot.copy_(self.length - self.last[:1])
        self.length.add_(1)
        sinks.copy_(self.order[:n_sinks] < self.last[:1])
        window.copy_(self.order[: window.shape[1]] <= self.slot)
        self.seen.copy_(self.order[: self.seen.shape[3]] <= self.newest)

    def nbytes(self) -> int:
        return sum(getattr(self, f.name).untyped_storage().nbytes() for f in fields(self))
