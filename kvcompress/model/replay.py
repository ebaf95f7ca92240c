"""A step of a model recorded once as a CUDA graph, so that it runs again without Python between the layers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Steps before one is recorded: kernels are compiled and tables made in them. They are steps like any other.
WARM_UP = 2
_RECORDING = threading.Lock()  # one at a time: a capture is a state of the whole device


def record(step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Return what runs a step again, and its result, which every run writes. The step itself is not run."""
    graph = torch.cuda.CUDAGraph()
    capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with _RECORDING, _uncollected(), torch.cuda.device(device), capture:
        result = step()
    return graph.replay, result


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within the block no garbage is collected: to free another graph would end a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
