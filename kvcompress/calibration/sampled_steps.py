"""Steps of sampling at fixed addresses: on a GPU one is recorded and replayed, since to start its kernels takes longer
than they do.

Rows are of one known length, so that keys and values have their places from the start, and a mask of the device's own
counter says which are filled. Whatever else a model caches or asks for, it is seen on the first tokens whether this
gives what the model gives (`check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress import compat
from kvcompress.model.positions import takes_positions
from kvcompress.model.replay import WARM_UP, record

#: Relative error of the logits within which two ways to the same tokens agree.
_TOLERANCE = {torch.float32: 1e-3}
_OF_16_BITS = 0.1


class StepsDiffer(RuntimeError):
    """Steps at fixed addresses do not give what the model gives."""


class FixedSteps:
    """Reads a token of each row at a time: `FixedSteps(model, n, length)(ids [n, 1])` -> logits [n, vocabulary].

    The logits are written anew by the next step. Raises RuntimeError where the model cannot be recorded.
    """

    def __init__(self, model: Any, n_rows: int, length: int) -> None:
        device = next(model.parameters()).device
        self._model, self._shape = model, (n_rows, length)
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # of the next token
        self._slots = torch.arange(length, device=device)
        self._token = torch.zeros(n_rows, 1, dtype=torch.long, device=device)
        layers = [_FixedLayer(self._place, length) for _ in compat.own_cache(model).layers]
        self._cache = compat.cache_argument(model, compat.Cache(layers=layers))
        self._replay: Callable[[], None] | None = None
        self._logits = torch.empty(0, device=device)
        self._n_steps = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self._token.copy_(ids)
        if self._replay is None and is_recorded(self._token.device) and self._n_steps >= WARM_UP:
            self._replay, self._logits = record(self._forward, self._token.device)
        if self._replay is None:
            self._logits = self._forward()
        else:
            self._replay()
        self._n_steps += 1
        return self._logits

    @property
    def recorded(self) -> bool:
        """Whether steps are replays of a CUDA graph."""
        return self._replay is not None

    def begin_again(self) -> None:
        """Forget the rows: what lies beyond the counter is not seen."""
        self._place.zero_()

    def check(self, rows: Tensor, logits: Tensor) -> None:
        """Raise StepsDiffer unless the model has the same logits after rows [n, n_tokens] when it reads them whole."""
        expected = self._model(input_ids=rows, use_cache=False).logits[:, -1].float()
        within = _TOLERANCE.get(logits.dtype, _OF_16_BITS)
        error = float((logits.float() - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error <= within:
            raise StepsDiffer(f"logits differ by {error:.2g} of their size")

    def _forward(self) -> Tensor:
        """Return the logits of one step; all that it reads and changes is on the device."""
        n_rows, length = self._shape
        output = self._model(
            input_ids=self._token,
            # as a mask of four dimensions it is taken as it is
            attention_mask=(self._slots <= self._place).expand(n_rows, 1, 1, length),
            position_ids=self._place.expand(n_rows, 1).clone(),
            use_cache=True,
            **self._cache,
        )
        self._place += 1
        logits: Tensor = output.logits[:, -1]
        return logits


def is_recorded(device: torch.device) -> bool:
    """Return whether steps on a device are recorded after the first ones."""
    return device.type == "cuda"


def can_be_fixed(model: Any, length: int) -> bool:
    """Return whether steps of rows of a length may be taken at fixed addresses, as far as is seen without a forward.

    On a GPU that holds the whole model, of layers that keep each token's keys and values and nothing else.
    """
    devices = {p.device for p in model.parameters()}
    return len(devices) == 1 and is_recorded(*devices) and keeps_rows_whole(model, length)


def keeps_rows_whole(model: Any, length: int) -> bool:
    """Return whether a model's own cache keeps all of a row, and takes positions."""
    layers = compat.own_cache(model).layers
    return bool(layers) and takes_positions(model) and all(compat.keeps_whole(layer, length) for layer in layers)


class _FixedLayer(compat.CacheLayer):
    """A layer's keys and values of rows of a known length; those to come are zeros, which the mask hides.

    Not transformers' StaticLayer: that one counts its tokens itself, by an argument in some releases and by a tensor in
    later ones, where here one counter on the device is that of all layers, the positions and the mask.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, place: Tensor, length: int) -> None:
        super().__init__()
        self._place, self._length = place, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        room = [t.new_zeros(*t.shape[:2], self._length, t.shape[3]) for t in (key_states, value_states)]
        self.keys, self.values = room
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._length, 0

    def get_max_length(self) -> int:
        return self._length
