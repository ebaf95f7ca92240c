"""Tensors of a checkpoint read by many threads, from memory-mapped files, into memory that is there already."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.checkpoint.reader import Checkpoint

_THREADS = 8
#: Numbers that a thread copies at once; to a GPU by way of memory that its copies reach directly.
_CHUNK = 1 << 23
#: Of safetensors; numbers of other dtypes (packed weights) are never converted.
_FLOATS = ("F64", "F32", "F16", "BF16")


class ParallelReader:
    """Reads tensors of one checkpoint to one device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "kvcompress-read")
        self._open = lru_cache(maxsize=None)(self._opened)
        self._own = threading.local()

    def read(self, copies: Sequence[tuple[Tensor, str]]) -> int:
        """Fill each flat tensor with the numbers of the one named, converted to its dtype; return the bytes read."""
        pieces: list[tuple[Tensor, Tensor]] = []
        for into, name in copies:
            source = self._open(self._checkpoint.tensors[name].file).get_tensor(name).flatten()
            pieces += zip(into.split(_CHUNK), source.split(_CHUNK), strict=True)
        for _ in self._pool.map(lambda piece: self._copy(*piece), pieces):
            pass  # raises what a copy has raised
        return sum(self._checkpoint.tensors[name].nbytes for _, name in copies)

    def dtype_of(self, name: str, wanted: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor is wanted: floating-point ones are converted, others stay."""
        return wanted if self._checkpoint.tensors[name].dtype in _FLOATS else self._open_dtype(name)

    def _open_dtype(self, name: str) -> torch.dtype:
        found: Tensor = self._open(self._checkpoint.tensors[name].file).get_tensor(name)
        return found.dtype

    def _opened(self, file: str) -> Any:
        from safetensors import safe_open

        return safe_open(self._checkpoint.path / file, framework="pt")

    def _copy(self, into: Tensor, source: Tensor) -> None:
        if self._device.type != "cuda":
            into.copy_(source)
            return
        stream, staging = self._staging()
        with torch.cuda.stream(stream):
            part = staging[: source.nbytes]
            part.numpy()[:] = source.view(torch.uint8).numpy()  # torch's own copy would begin threads in each of ours
            into.copy_(part.view(source.dtype), non_blocking=True)
        stream.synchronize()

    def _staging(self) -> tuple[torch.cuda.Stream, Tensor]:
        """Return this thread's stream, on which copies pass by what the model computes, and its pinned memory."""
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
            self._own.staging = torch.empty(_CHUNK * 8, dtype=torch.uint8, pin_memory=True)
        return self._own.stream, self._own.staging
