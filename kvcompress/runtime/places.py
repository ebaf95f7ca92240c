"""Which layers of a model's cache are compressed, and who reads them; the others stay as transformers keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvcompress import compat
from kvcompress.errors import OptionError


@dataclass(frozen=True)
class Places:
    """The layers of a cache. layers: the place of each layer that is compressed; readers: how many attentions of one
    forward get the tensors that its `update` returned, none where the model works on them before it attends.

    own: makes the model's own layers, of which those at `layers` are replaced; None where there are no others.
    """

    layers: tuple[int, ...]
    readers: tuple[int, ...]
    own: Callable[[], list[Any]] | None = None

    @classmethod
    def all_of(cls, n_layers: int) -> Places:
        """Return the places of a model whose every layer is compressed and read by its own attention alone."""
        return cls(tuple(range(n_layers)), (1,) * n_layers)

    @property
    def n_attending(self) -> int:
        """How many attentions of one forward go through a compressed layer."""
        return sum(self.readers)

    @property
    def are_all_read(self) -> bool:
        """Whether attention itself reads every layer, so that all queries of a text can be simulated at once."""
        return all(self.readers)

    def filled(self, make: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return a cache's layers: those that `make` gives at their places, the model's own at the others."""
        if self.own is None:
            return [one() for one in make]
        layers = self.own()
        for place, one in zip(self.layers, make, strict=True):
            layers[place] = compat.with_state_of(layers[place], one())
        return layers


def own_nbytes(layer: Any) -> int:
    """Return the bytes of the storages of one of transformers' own cache layers, or of a compressed one's states."""
    return sum(t.untyped_storage().nbytes() for t in compat.layer_tensors(layer, states_only=hasattr(layer, "codecs")))


def trimmed(layer: Any) -> None:
    """Let a layer with a window hold no token more: transformers keeps a view of all that it was given."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            setattr(layer, name, tensor.clone())


def not_simulated() -> OptionError:
    """Return the error of a model whose attention over a whole text cannot be simulated."""
    return OptionError(
        "the model works on what its cache returns before it attends (latent attention, or an older model file): "
        "queries of a text cannot be simulated at once. kvcompress.evaluate steps through it with the real cache."
    )
