"""The model that is calibrated, kept for what is done with it once the moments are known."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcompress.calibration.memory import free_bytes, whole_bytes
from kvcompress.calibration.moments import Moments
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.errors import Note

if TYPE_CHECKING:
    from kvcompress.calibration.pieces import Workers

#: Weights above this are not loaded for a second pass alone, which takes a second: another budget would wait for them.
_MOST_LOADED = 4e9


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Where a model is that this process does not hold as a whole: with workers, or on disk, its layers streamed.

    memory: bytes in which layers are streamed, on `device` or on that of each worker; None: workers hold it whole.
    """

    checkpoint: str
    dtype: str
    device: str
    memory: int | None
    workers: Workers | None


class ModelAtHand:
    """The model of a checkpoint, loaded when it is first asked for and kept until it is let go."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._model, self._as = checkpoint, None, ("", "")
        #: Set where the moments were taken of it elsewhere.
        self.elsewhere: Elsewhere | None = None

    def __call__(self, dtype: str, device: str) -> Any:
        """Return the model; loaded anew where it is there in another dtype or on another device. See load_weights."""
        if self._as != (dtype, device):
            from kvcompress.checkpoint.loading import load_weights

            self.let_go()
            self._model, self._as = load_weights(self.checkpoint.path, dtype=dtype, device=device), (dtype, device)
        return self._model

    def let_go(self) -> None:
        self._model, self._as = None, ("", "")

    def again(self, moments: Moments, *, wanted: bool | None, memory: int | None) -> Any | Elsewhere | None:
        """Return the model as the moments were taken of it, or where it is; None, and a note, where it is left alone.

        wanted: None where that is not to take much longer than what is done with it. memory: bytes that it may take.
        """
        arithmetic, device = moments.protocol["dtype"], moments.protocol["device"]
        if self.elsewhere is not None:
            return self.elsewhere
        if self._as == (arithmetic, device) or wanted is False:
            return self._model
        if wanted is None and self.checkpoint.weight_bytes > _MOST_LOADED:
            self._left_out("the model is not loaded again for another budget (--refit does)")
            return None
        whole = whole_bytes(self.checkpoint, arithmetic, moments.protocol["seq_len"])
        room = free_bytes(device) if memory is None else memory
        if room is not None and room < whole:
            return Elsewhere(str(self.checkpoint.path.absolute()), arithmetic, device, room, None)
        return self(arithmetic, device)

    def _left_out(self, why: str) -> None:
        warnings.warn(f"{why}, so decoders of values are not fitted to what queries read of them.", Note, stacklevel=4)
