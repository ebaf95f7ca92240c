"""Where calibration takes x and its gradient: at the cache's `update`, whatever the model around it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcompress import compat
from kvcompress.calibration.attention import near_far_attention
from kvcompress.calibration.straight import straight_through
from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.recording import extras_of

_TAPPING = "kvcompress_calibration"


def unplanned_attention() -> AbstractContextManager[None]:
    """Return a block in which torch's attention is not cuDNN's, which plans for each length and shape at its first use.

    That takes tens of milliseconds of all processors each time, and a second at first.
    """
    found: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return found


@dataclass
class LayerTap:
    """What one layer handed to its cache. far: leaves with the same numbers, whose gradients are wanted.

    Where the model attends to what its cache returned, there is a pair of leaves for each reader, which only queries
    more than a window away reach; elsewhere one pair, which all queries reach.
    """

    key: Tensor
    value: Tensor
    far: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Taps:
    """The taps of the layers that were last run with gradients; `cache()` gives each run a cache that fills them."""

    def __init__(self, model: Any, spec: ModelSpec, recent: int) -> None:
        self.recent, self.layers = recent, dict[int, LayerTap]()
        #: Whether passes without gradients compute attention in the same steps as those with.
        self.same_steps = False
        self._model, self._spec = model, spec

    def cache(self) -> Any:
        """Return an empty cache whose layers with sites write down what they are handed, and store nothing."""
        cache = compat.own_cache(self._model)
        for attention in self._spec.layers:
            layer = cache.layers[attention.layer]
            layer.update = self._update(attention.layer, is_read=bool(attention.readers))
        return cache

    def _update(self, index: int, *, is_read: bool) -> Any:
        def update(key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not torch.is_grad_enabled():
                return key, value
            tap = self.layers[index] = LayerTap(key, value)
            if is_read:
                return key, value
            tap.far.append((key.clone(), value.clone()))
            return tap.far[0]

        return update

    def attend(
        self, module: Any, own: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a model that is calibrated: near and far keys apart where gradients are wanted."""
        tap = next((t for t in self.layers.values() if t.key is key and t.value is value), None)
        again = self.same_steps and not torch.is_grad_enabled()
        if not again and (not torch.is_grad_enabled() or tap is None):
            return compat.own_attention(module, own)(module, query, key, value, mask, **kwargs)
        far = key.clone(), value.clone()
        if tap is not None:
            tap.far.append(far)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        pairs = (key, far[0]), (value, far[1])
        return near_far_attention(query * scaling, *pairs, mask, self.recent, **extras_of(kwargs)), None


@contextmanager
def tapped(model: Any, spec: ModelSpec, recent: int) -> Iterator[Taps]:
    """Within the block, layers run with gradients and a cache of the yielded taps leave what they cached there.

    recent: keys at most this many tokens back are near, seen exactly; a token always sees itself exactly.
    """
    taps = Taps(model, spec, recent)
    with compat.attention_replaced(model, _TAPPING, taps.attend), straight_through(model), unplanned_attention():
        yield taps
