"""Tensors that grow along one dimension by a share of themselves, so that appending copies little."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

#: A tensor that must grow gets room for this part of its length more; room is counted in nbytes().
GROWTH = 8


class GrowingTensor:
    """A tensor with room behind it. `filled` is a view of what has been appended; the room may hold anything."""

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self._buffer, self._dim, self.length = tensor, dim, tensor.shape[dim]

    @property
    def filled(self) -> Tensor:
        whole = self.length == self._buffer.shape[self._dim]
        return self._buffer if whole else self._buffer.narrow(self._dim, 0, self.length)

    def append(self, new: Tensor, *, step: int = 1) -> None:
        """Append along the dimension. step: what room is a multiple of, so that short tensors have none."""
        length = self.length + new.shape[self._dim]
        if length > self._buffer.shape[self._dim]:
            size = list(self._buffer.shape)
            size[self._dim] = length + length // GROWTH // step * step
            buffer = self._buffer.new_empty(size)
            buffer.narrow(self._dim, 0, self.length).copy_(self.filled)
            self._buffer = buffer
        self._buffer.narrow(self._dim, self.length, new.shape[self._dim]).copy_(new)
        self.length = length

    @property
    def room_bytes(self) -> int:
        """The bytes of the room behind what is filled."""
        return (self._buffer.numel() - self.filled.numel()) * self._buffer.element_size()


class Grown:
    """An attribute that reads as the filled part of a GrowingTensor, or None; setting it leaves no room behind."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Grown: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> Any: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        growing = self.growing(instance)
        return None if growing is None else growing.filled

    def __set__(self, instance: Any, tensor: Tensor | None) -> None:
        vars(instance)[self._name] = None if tensor is None else GrowingTensor(tensor, self._dim)

    def growing(self, instance: Any) -> GrowingTensor | None:
        """Return what holds the attribute of an object, to be appended to."""
        growing: GrowingTensor | None = vars(instance).get(self._name)
        return growing


def append(instance: Any, attribute: Grown, new: Tensor, *, step: int = 1) -> None:
    """Append to a growing attribute of an object; where there is none yet, `new` becomes it, with no room behind."""
    growing = attribute.growing(instance)
    if growing is None:
        attribute.__set__(instance, new)
    else:
        if torch.is_grad_enabled() and (new.requires_grad or growing.filled.requires_grad):
            attribute.__set__(instance, torch.cat([growing.filled, new], attribute._dim))  # views would lose gradients
        else:
            growing.append(new, step=step)
