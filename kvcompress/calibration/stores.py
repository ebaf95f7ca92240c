"""Hidden states of windows in files, and how they come to the device and go while a layer runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Windows that are on their way to the device at most, and back: a copy to a file's memory takes longer than a layer.
_AHEAD = 4


class Store:
    """A tensor [n_windows, seq_len, d_model] in a file, which the system keeps in memory where there is room."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: torch.dtype, *, exists: bool = False) -> None:
        self._file = file
        if not exists:
            file.unlink(missing_ok=True)
        self._rows: Tensor | None = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(
            shape
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> Tensor:
        assert self._rows is not None
        return self._rows

    def put(self, place: int, hidden: Tensor) -> None:
        self.rows[place].copy_(hidden[0].detach())

    def remove(self) -> None:
        self._rows = None
        self._file.unlink(missing_ok=True)


class Flow:
    """Within the block, windows come from stores and go to one, on streams beside what the device computes."""

    def __init__(self, device: torch.device, sources: Sequence[Store], into: Store) -> None:
        self._device, self._sources, self._into = device, sources, into
        self._on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2 * _AHEAD)] if self._on_gpu else []
        self._going: list[Future[None]] = []

    def __enter__(self) -> Flow:
        self._coming_pool, self._going_pool = ThreadPoolExecutor(_AHEAD), ThreadPoolExecutor(_AHEAD)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._coming_pool.shutdown()
        self._going_pool.shutdown()
        if kind is None:
            for future in self._going:
                future.result()

    def rows(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (place, [1, seq_len, d_model] of each source) of every window, on the device."""
        n = len(self._sources[0])
        coming = [self._coming_pool.submit(self._get, place) for place in range(min(_AHEAD, n))]
        for place in range(n):
            found = coming.pop(0).result()
            if place + _AHEAD < n:
                coming.append(self._coming_pool.submit(self._get, place + _AHEAD))
            if self._on_gpu:
                for tensor in found:  # made on another stream, whose memory is not to be used again before this is done
                    tensor.record_stream(torch.cuda.current_stream(self._device))
            yield place, found

    def put(self, place: int, hidden: Tensor) -> None:
        """Let a window go to its place; it is there when the block ends."""
        hidden = hidden.detach()
        event = torch.cuda.current_stream(self._device).record_event() if self._on_gpu else None
        if len(self._going) >= _AHEAD:
            self._going.pop(0).result()
        self._going.append(self._going_pool.submit(self._put, place, hidden, event))

    def _get(self, place: int) -> list[Tensor]:
        if not self._on_gpu:
            return [source.rows[place : place + 1].clone() for source in self._sources]
        rows = [source.rows[place : place + 1] for source in self._sources]
        pinned = [_pinned(row) for row in rows]
        for row, between in zip(rows, pinned, strict=True):
            _bytes(between)[:] = _bytes(row)
        stream = self._streams[place % _AHEAD]
        with torch.cuda.stream(stream):
            found = [between.to(self._device, non_blocking=True) for between in pinned]
        stream.synchronize()
        return found

    def _put(self, place: int, hidden: Tensor, event: Any) -> None:
        if not self._on_gpu:
            self._into.put(place, hidden)
            return
        row, stream = self._into.rows[place], self._streams[_AHEAD + place % _AHEAD]
        between = _pinned(row)
        with torch.cuda.stream(stream):
            stream.wait_event(event)
            between.copy_(hidden[0], non_blocking=True)
        stream.synchronize()
        _bytes(row)[:] = _bytes(between)


def _pinned(row: Tensor) -> Tensor:
    """Return memory for a row that a GPU's copies reach directly: those of other memory wait for each other."""
    return torch.empty(row.shape, dtype=row.dtype, pin_memory=True)


def _bytes(row: Tensor) -> Any:
    """Return a row's bytes as numpy has them, which copies them beside other threads and begins none."""
    return row.view(torch.uint8).numpy()
