"""Triton's interpreter, mended where a newer numpy breaks it, so that kernels can be tested without a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def mend() -> None:
    """Let loops run to a bound that is a tensor: numpy from 2.4 on makes no int of an array of one element."""
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)  # of Triton up to 3.6 at least
    if patch is None:
        return

    def mended(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)  # what it sets is taken back after the kernel, and with it this
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = mended
