"""What the way into a model and its recorded steps know of what is attached to it."""

from __future__ import annotations

from typing import Protocol

from kvcompress.compat import PreTrainedModel
from kvcompress.kernels.layer import LayerKernels
from kvcompress.plan import Plan
from kvcompress.runtime.cache import CompressedCache
from kvcompress.runtime.places import Places


class Attached(Protocol):
    """A model with a plan attached: attach.Attachment, which imports those who take one."""

    model: PreTrainedModel
    plan: Plan
    codecs: list[LayerKernels]
    places: Places

    def new_cache(self) -> CompressedCache:
        """Return an empty compressed cache for the model."""

    def check_capacity(self, capacity: int) -> None:
        """Raise OptionError where the model cannot have a cache at fixed addresses for `capacity` tokens."""
