"""What belongs to one forward of an attached model: kept beside it in its thread, never on the model.

Several threads may so run one model, attached or not, each with its own caches. A cache layer whose `update` was called
hands itself to the attention function, which transformers calls next in the same thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvcompress import compat

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Return a function that torch.compile leaves as it is, and all that it calls: a trace keeps one call's state.

    The layers of a model around it are compiled all the same.
    """
    return torch.compiler.disable(function)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a forward brings to its cache. positions: [batch or 1, n_new]; mask: the caller's, of any form, or None."""

    positions: Tensor
    batch: int
    mask: Any


@dataclass(slots=True, eq=False)
class Call:
    """One forward, from its beginning to its end.

    cache: the one of ours that it goes through, a simulated one included, or None: everything stays exact. arriving:
    what it brings, until the cache has noted it. handed: the cache layer whose `update` ran and whose attention is to
    come. n_attended: attentions that went through our function and a layer of ours. shared: by place in the cache,
    layers that several attentions read, and how many are still to come.
    """

    cache: Any
    arriving: Arrival | None = None
    handed: Any = None
    n_attended: int = 0
    shared: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def prove(self, expected: int, model: Any) -> None:
        """Raise AttachmentError unless `expected` attentions of the model went through us."""
        if self.n_attended != expected:
            raise compat.unproven(
                f"of the {expected} layers of {type(model).__name__} that a compressed cache is attached to, "
                f"{self.n_attended} attended through it"
            )

    def hand(self, layer: Any, place: int, n_readers: int) -> None:
        """Hand a layer to the attentions that read it: the next one, and later ones of modules that share it."""
        self.handed = layer if n_readers else None
        if n_readers > 1:
            self.shared[place] = layer, n_readers

    def take(self, place: int | None) -> tuple[Any, bool]:
        """Return (the layer that was handed over, once, or that a module at `place` shares, or None; whether this is
        its last reader)."""
        layer, self.handed = self.handed, None
        if place not in self.shared:
            self.n_attended += layer is not None
            return layer, True
        layer, left = self.shared.pop(place)
        self.n_attended += 1
        if left > 1:
            self.shared[place] = layer, left - 1
        return layer, left == 1


_current: ContextVar[Call | None] = ContextVar("kvcompress_call", default=None)
_left_alone: ContextVar[bool] = ContextVar("kvcompress_left_alone", default=False)


def current() -> Call | None:
    """Return the innermost forward of an attached model that this thread is in, or None."""
    return _current.get()


@contextmanager
def running(call: Call) -> Iterator[Call]:
    """Within the block, `call` is the current one."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)
        call.handed = None
        call.shared.clear()  # an attention that was left half-way must not keep a cache alive


def count_attention() -> None:
    """Count an attention that went through our function, though over no layer of ours."""
    call = _current.get()
    if call is not None:
        call.n_attended += 1


@contextmanager
def uncompressed() -> Iterator[None]:
    """Within the block, attached models leave alone an uncompressed cache that they are given, in this thread.

    Elsewhere they refuse one, which would quietly compress nothing.
    """
    token = _left_alone.set(True)
    try:
        yield
    finally:
        _left_alone.reset(token)


def caches_are_left_alone() -> bool:
    """Return whether this thread is in a block of `uncompressed`."""
    return _left_alone.get()
