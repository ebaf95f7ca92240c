"""kvcompress: make the KV cache of a trained LLM several times smaller, and run the result.

`load(directory)` and `attach(model, directory)` run a compressed checkpoint in transformers; within a block of
`uncompressed()` an attached model takes transformers' own caches, too;
`compress(source, output, options)` makes one; `heal(directory, output, options)` trains one;
`GraphDecoder(model, capacity=n)` decodes by replaying a CUDA graph.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvcompress.options import CompressOptions
    from kvcompress.pipeline import compress
    from kvcompress.runtime.attach import attach, detach
    from kvcompress.runtime.calls import uncompressed
    from kvcompress.runtime.graph import GraphDecoder
    from kvcompress.runtime.load import load

__all__ = [
    "CompressOptions",
    "GraphDecoder",
    "HealOptions",
    "attach",
    "compress",
    "detach",
    "heal",
    "load",
    "uncompressed",
]

_HOMES = {
    "CompressOptions": "kvcompress.options",
    "HealOptions": "kvcompress.heal.options",
    "compress": "kvcompress.pipeline",
    "GraphDecoder": "kvcompress.runtime.graph",
    "attach": "kvcompress.runtime.attach",
    "detach": "kvcompress.runtime.attach",
    "load": "kvcompress.runtime.load",
    "uncompressed": "kvcompress.runtime.calls",
}


def __getattr__(name: str) -> Any:
    if name == "heal":  # a room that can be called
        return import_module("kvcompress.heal")
    if name not in _HOMES:
        raise AttributeError(f"module 'kvcompress' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
