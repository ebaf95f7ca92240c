"""The model that is calibrated, kept for what is done with it once the moments are known."""

from __future__ import annotations

import warnings
from typing import Any

from kvcompress.calibration.memory import free_bytes, whole_bytes
from kvcompress.calibration.moments import Moments
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import Note

#: Weights above this are not loaded for a second pass alone, which takes a second: another budget would wait for them.
_MOST_LOADED = 4e9


class ModelAtHand:
    """The model of a checkpoint, loaded when it is first asked for and kept until it is let go."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._model, self._as = checkpoint, None, ("", "")

    def __call__(self, dtype: str, device: str) -> Any:
        """Return the model; loaded anew where it is there in another dtype or on another device. See load_weights."""
        if self._as != (dtype, device):
            from kvcompress.checkpoint.loading import load_weights

            self.let_go()
            self._model, self._as = load_weights(self.checkpoint.path, dtype=dtype, device=device), (dtype, device)
        return self._model

    def let_go(self) -> None:
        self._model, self._as = None, ("", "")

    def again(self, moments: Moments, *, wanted: bool | None, memory: int | None) -> Any | None:
        """Return the model as the moments were taken of it; None, and a note, where it is not loaded for that.

        wanted: None where that is not to take much longer than what is done with it. memory: bytes that it may take.
        """
        arithmetic, device = moments.protocol["dtype"], moments.protocol["device"]
        if self._as == (arithmetic, device) or wanted is False:
            return self._model
        whole = whole_bytes(self.checkpoint, arithmetic, moments.protocol["seq_len"])
        room = free_bytes(device) if memory is None else memory
        if room is not None and room < whole:
            self._left_out("the model does not fit as a whole")
            return None
        if wanted is None and self.checkpoint.weight_bytes > _MOST_LOADED:
            self._left_out("the model is not loaded again for another budget (--refit does)")
            return None
        return self(arithmetic, device)

    def _left_out(self, why: str) -> None:
        warnings.warn(f"{why}, so decoders of values are not fitted to what queries read of them.", Note, stacklevel=4)
