"""Decoding end to end: tokens a second of a whole model at the largest batch that its cache lets fit."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcompress.bench.random_model import (
    cache_nbytes,
    fill_compressed,
    fill_fixed,
    random_model,
    random_plan,
    uncompressed_cache,
)
from kvcompress.bench.timing import seconds
from kvcompress.bench.workload import Shape
from kvcompress.compat import Cache, PreTrainedModel, cache_argument
from kvcompress.errors import OptionError
from kvcompress.model.replay import record
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.attach import attach_plan, attachment_of, detach
from kvcompress.runtime.graph import GraphDecoder

#: One whole round of evictions each: every layer encodes a block once in BLOCK_TOKENS steps.
WARM_UP, STEPS = BLOCK_TOKENS, 2 * BLOCK_TOKENS
#: The rows that are compared with: the last two grow, in place and as transformers lets them.
UNCOMPRESSED = ("recorded", "preallocated", "dynamic")
#: Steps before one is recorded.
_UNRECORDED = 2
#: The share of the memory left for what a step works with (logits, MLP, a layer's cache while it is copied).
_WORKSPACE = 1 / 32
#: Bytes of caches on a CPU, where whatever fits would take hours.
_CPU_CACHE = 2e9

#: A batch -> a Decoder or a FixedDecoder.
MakeDecoder = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """One row of the table. Times in milliseconds, of one step: one token of each sequence.

    cache: those of UNCOMPRESSED, of which a GPU replays a recorded step over `recorded`; `compressed` grows, `fixed` is
    a compressed one of a fixed capacity, over which a GPU replays a recorded step, too.
    computed_batch: from bytes alone; batch: what ran.
    milliseconds: the mean, in which evictions have their share; one step in 32 has them, so the median has none.
    speedup: in tokens a second, over the fastest uncompressed row of the same context; None where none fits.
    """

    cache: str
    keep: float
    context: int
    batch: int
    computed_batch: int
    milliseconds: float
    median_milliseconds: float
    slowest_milliseconds: float
    cache_bytes: int
    peak_bytes: int | None
    speedup: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.batch / self.milliseconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


class Decoder:
    """Greedy decoding of one token of each sequence at a time, from a random token on; logits: those of the last.

    recordable: all sizes stay, so that a GPU can record a step as a CUDA graph and replay it.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, context: int, batch: int, *, recordable: bool = False
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.cache = model, cache
        self.token = torch.randint(model.config.vocab_size, (batch, 1), device=device)
        self.positions = torch.full((batch, 1), context, device=device)
        self.logits: Tensor | None = None
        self._steps_to_recording = _UNRECORDED if recordable and device.type == "cuda" else -1
        self._replay: Callable[[], None] | None = None

    def step(self) -> None:
        if self._replay is None and self._steps_to_recording == 0:
            self._replay, self.logits = record(self._forward, self.token.device)
        self._steps_to_recording -= 1
        if self._replay is None:
            self.logits = self._forward()
        else:
            self._replay()

    def _forward(self) -> Tensor:
        output = self.model(input_ids=self.token, position_ids=self.positions, **cache_argument(self.model, self.cache))
        logits = output.logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.positions.add_(1)
        return logits


class FixedDecoder:
    """The same through GraphDecoder, over a compressed cache of a fixed capacity."""

    def __init__(self, model: PreTrainedModel, context: int, batch: int) -> None:
        device = next(model.parameters()).device
        self._decoder = GraphDecoder(model, capacity=context + WARM_UP + STEPS)
        self.cache = self._decoder.cache
        fill_fixed(self.cache, context, batch, device=device, dtype=model.dtype)
        self.token = torch.randint(model.config.vocab_size, (batch,), device=device)

    def step(self) -> None:
        self.token = self._decoder.step(self.token).argmax(-1)


def time_decode(
    shape: Shape, counts: Mapping[float, Mapping[str, dict[int, int]]], *, contexts: Sequence[int], batch: int | None,
    turn: int, memory_gb: float, device: torch.device, dtype: torch.dtype,
) -> list[DecodeTiming]:  # fmt: skip
    """Return rows of every context: the uncompressed caches, then two for every keep; without those of which none fits.

    batch: the same for all, instead of the largest that fits. counts: {keep: {"key" and "value": {bits: components}}}.
    Raises OptionError if the weights alone do not fit.
    """
    rows: list[DecodeTiming] = []
    plans = {keep: random_plan(shape, parts["key"], parts["value"], dtype, turn=turn) for keep, parts in counts.items()}
    with _memory_limit(device, memory_gb) as limit, torch.no_grad():
        _check_weights(shape, limit, dtype)
        model = random_model(shape, device, dtype)
        for context in contexts:
            run = _Run(model, context, batch, limit)
            n_bytes = 2 * (context + WARM_UP + STEPS) * shape.width * shape.n_layers * dtype.itemsize
            plain = partial(uncompressed_cache, shape, context, device=device, dtype=dtype)
            n_steady = 2 * (context + 1) * shape.width * shape.n_layers * dtype.itemsize
            steady = partial(uncompressed_cache, shape, context + 1, n_new=0, device=device, dtype=dtype)
            found = [
                run.time("recorded", 1.0, steady, n_steady, recordable=True),
                run.time("preallocated", 1.0, partial(plain, n_new=WARM_UP + STEPS), n_bytes),
                run.time("dynamic", 1.0, partial(plain, n_new=None), n_bytes),
            ]
            for keep, (plan, maps) in plans.items():
                attachment = attachment_of(attach_plan(model, plan, maps))
                make = partial(_compressed, attachment.new_cache, context, device=device, dtype=dtype)
                found.append(run.time("compressed", keep, make, bytes_per_sequence(plan, context, dtype)))
                fixed = partial(FixedDecoder, model, context)
                n_fixed = fixed_bytes_per_sequence(plan, context, dtype)
                found.append(run.time_decoder("fixed", keep, fixed, n_fixed))
                del attachment, make, fixed
                detach(model)
            rows += _with_speedups([row for row in found if row is not None])
    return rows


def bytes_per_sequence(plan: Plan, context: int, dtype: torch.dtype) -> int:
    """Return the most bytes that the compressed cache of one sequence takes between its steps."""
    last = context + WARM_UP + STEPS
    return max(plan.cache_bytes(n, exact_number_bytes=dtype.itemsize) for n in range(last - BLOCK_TOKENS, last + 1))


def fixed_bytes_per_sequence(plan: Plan, context: int, dtype: torch.dtype) -> int:
    """Return the bytes of one sequence in a cache of a fixed capacity: when full, and room for a block more."""
    n_tokens = plan.n_encoded(context + WARM_UP + STEPS) + plan.recent
    room = BLOCK_TOKENS * sum(s.width for s in plan.sites) * dtype.itemsize
    return plan.cache_bytes(n_tokens, exact_number_bytes=dtype.itemsize) + room


def largest_batch(bytes_of_one: int, fixed_bytes: int, limit: float, device: torch.device) -> int:
    """Return how many sequences fit beside fixed_bytes in all but the workspace of `limit` bytes."""
    room = limit * (1 - _WORKSPACE) - fixed_bytes
    return max(0, int((room if device.type == "cuda" else min(room, _CPU_CACHE)) // bytes_of_one))


@dataclass(frozen=True, slots=True)
class _Run:
    model: PreTrainedModel
    context: int
    batch: int | None
    limit: float

    def time(
        self,
        name: str,
        keep: float,
        make_cache: Callable[[int], Cache],
        bytes_of_one: int,
        *,
        recordable: bool = False,
    ) -> DecodeTiming | None:
        def make(batch: int) -> Decoder:
            return Decoder(self.model, make_cache(batch), self.context, batch, recordable=recordable)

        return self.time_decoder(name, keep, make, bytes_of_one)

    def time_decoder(self, name: str, keep: float, make: MakeDecoder, bytes_of_one: int) -> DecodeTiming | None:
        """Return the row of the largest batch that runs, or None if not even one sequence does."""
        device = next(self.model.parameters()).device
        computed = largest_batch(bytes_of_one, self._fixed_bytes(make), self.limit, device)
        batch = self.batch or computed
        while batch > 0:
            measured = self._steps(make, batch, WARM_UP, STEPS)
            _free(device)
            if measured is not None:
                times, n_bytes, peak = measured
                return DecodeTiming(
                    cache=name,
                    keep=keep,
                    context=self.context,
                    batch=batch,
                    computed_batch=computed,
                    milliseconds=1e3 * statistics.fmean(times),
                    median_milliseconds=1e3 * statistics.median(times),
                    slowest_milliseconds=1e3 * max(times),
                    cache_bytes=n_bytes,
                    peak_bytes=peak,
                )
            batch -= max(1, batch // 10)
        return None

    def _fixed_bytes(self, make: MakeDecoder) -> int:
        """Return the bytes that do not grow with the batch: weights, maps, tables and workspaces of libraries.

        On a GPU one sequence is decoded first, for what is made on first use, kernels and dense maps among it.
        """
        device = next(self.model.parameters()).device
        if device.type != "cuda":
            return sum(p.numel() * p.element_size() for p in self.model.parameters())
        self._steps(make, 1, BLOCK_TOKENS, 1)
        _free(device)
        return torch.cuda.memory_allocated(device)

    def _steps(
        self, make: MakeDecoder, batch: int, n_warm_up: int, n_steps: int
    ) -> tuple[list[float], int, int | None] | None:
        """Return the seconds of each step, the cache's bytes after them and the most allocated, or None: no memory."""
        device = next(self.model.parameters()).device
        gpu = device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            decoder = make(batch)
            _free(device)  # what filling left behind
            times = [seconds(decoder.step, device) for _ in range(n_warm_up + n_steps)][n_warm_up:]
        except torch.OutOfMemoryError:
            return None
        return times, cache_nbytes(decoder.cache), torch.cuda.max_memory_allocated(device) if gpu else None


def _compressed(
    new_cache: Callable[[], Any], context: int, batch: int, *, device: torch.device, dtype: torch.dtype
) -> Cache:
    return fill_compressed(new_cache(), context, batch, device=device, dtype=dtype)


def _with_speedups(rows: list[DecodeTiming]) -> list[DecodeTiming]:
    plain = [row.tokens_per_second for row in rows if row.cache in UNCOMPRESSED]
    return [replace(row, speedup=row.tokens_per_second / max(plain)) for row in rows] if plain else rows


@contextmanager
def _memory_limit(device: torch.device, memory_gb: float) -> Iterator[float]:
    """Yield the bytes to be used: memory_gb, or what is free if that is less; a GPU's allocator is held to it."""
    limit = memory_gb * 1e9
    if device.type != "cuda":
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else limit
        yield min(limit, physical)
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    _free(device)
    free, total = torch.cuda.mem_get_info(index)
    limit = min(limit, free + torch.cuda.memory_reserved(index))
    torch.cuda.set_per_process_memory_fraction(limit / total, index)
    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def _check_weights(shape: Shape, limit: float, dtype: torch.dtype) -> None:
    sizes = [p.numel() for p in random_model(shape, torch.device("meta"), dtype).parameters()]
    if sum(sizes) * dtype.itemsize >= limit:
        raise OptionError(
            f"--decode: the weights of {shape.name} take {sum(sizes) * dtype.itemsize / 1e9:.1f} GB, and there are "
            f"{limit / 1e9:.1f} GB for weights and cache. Choose a smaller --shape, or give more --memory."
        )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
