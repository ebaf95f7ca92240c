"""`bench` from options to a document: every combination that fits the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompress.bench.attention import AttentionTiming, time_attention
from kvcompress.bench.decode import DecodeTiming, time_decode
from kvcompress.bench.pages import ChunkTiming, PagedTiming, blocks_of_page, random_pool, time_chunk, time_pages
from kvcompress.bench.prefill import PrefillTiming, sequences_that_fit, time_prefill
from kvcompress.bench.timing import copy_bytes_per_second, matrix_flops_per_second
from kvcompress.bench.workload import SHAPES, Shape, components_at_a_time, shape_of_output, typical_counts
from kvcompress.errors import OptionError
from kvcompress.options import GAIN_BITS, TILE_TOKENS, is_turn
from kvcompress.plan import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `bench` measured. counts: {keep: {"key" and "value": {bits: components}}}; fits: computed, not measured."""

    shape: Shape
    device: str
    torch_version: str
    dtype: str
    copy_bytes_per_second: float
    matrix_flops_per_second: float
    turn: int
    counts: dict[str, dict[str, dict[int, int]]]
    attention: list[AttentionTiming]
    prefill: list[PrefillTiming]
    fits: list[dict[str, Any]]
    decode: list[DecodeTiming]
    pages: list[PagedTiming]
    chunks: list[ChunkTiming]

    def to_json(self) -> dict[str, Any]:
        tables = "attention", "prefill", "decode", "pages", "chunks"
        rows = {name: [row.to_json() for row in getattr(self, name)] for name in tables}
        names = (
            "device",
            "torch_version",
            "dtype",
            "copy_bytes_per_second",
            "matrix_flops_per_second",
            "turn",
            "counts",
            "fits",
        )
        return {"shape": asdict(self.shape)} | {name: getattr(self, name) for name in names} | rows


def run_bench(
    *, output: Path | None, shape: str, keeps: Sequence[float], ranks_only: bool, contexts: Sequence[int],
    batches: Sequence[int], turn: int, memory_gb: float, device: str, decode: bool = False,
    decode_batch: int | None = None, pages: bool = False,
) -> BenchReport:  # fmt: skip
    """Return the timings of every keep, context and batch; combinations too large for the device are left out.

    output: its own shape, share and turn are timed, instead of shape, keeps, ranks_only and turn. decode: also time a
    whole model, at decode_batch sequences or the most that fit in memory_gb. pages: also time the same tokens in pages,
    as an engine keeps them, and a chunk of a prompt after the longest context of up to 32k.
    Raises OptionError for an unknown shape, an output of which nothing can be timed, a device that is not there, a
    model to decode with that does not fit, or pages without the kernels that read them.
    """
    if min(contexts) < BLOCK_TOKENS:
        raise OptionError(f"--context {min(contexts)}: nothing is packed below {BLOCK_TOKENS} tokens. Ask for more.")
    if not is_turn(turn):
        raise OptionError(f"--turn {turn}: a turn is 1 token, or a power of two from {BLOCK_TOKENS} on.")
    where = _device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    sizes, counts, turn = _workloads(output, shape, keeps, ranks_only, turn)
    attention, prefill, fits, decoded = [], [], [], []
    paged, chunks = _time_pages(sizes, counts, contexts, batches, turn, where, dtype) if pages else ([], [])
    if decode:
        decoded = time_decode(
            sizes,
            counts,
            contexts=contexts,
            batch=decode_batch,
            turn=turn,
            memory_gb=memory_gb,
            device=where,
            dtype=dtype,
        )
    for keep, parts in counts.items():
        site = parts["key"], parts["value"]
        how: dict[str, Any] = {"turn": turn, "device": where, "dtype": dtype}
        attention += [
            time_attention(sizes, *site, keep=keep, context=context, batch=batch, **how)
            for context in contexts
            for batch in batches
            if _fits(sizes, context, batch, where, dtype)
        ]
        fits += [_sequences(sizes, keep, parts, context, memory_gb) for context in contexts]
        longest = min(max(contexts), 32768 if where.type == "cuda" else 1024)
        prefill.append(time_prefill(sizes, *site, context=longest, **how))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return BenchReport(
        sizes, name, torch.__version__, str(dtype).removeprefix("torch."), copy_bytes_per_second(where),
        matrix_flops_per_second(where), turn, {f"{k:g}": v for k, v in counts.items()}, attention, prefill, fits,
        decoded, paged, chunks,
    )  # fmt: skip


def _sequences(
    shape: Shape, keep: float, parts: dict[str, dict[int, int]], context: int, memory_gb: float
) -> dict[str, Any]:
    """Return how many sequences of a context fit, compressed and not: computed, not measured."""
    packed, whole = sum(_bits(part) for part in parts.values()) / 8, 4 * shape.width
    counted = {
        name: sequences_that_fit(shape, n_bytes, context=context, memory_bytes=memory_gb * 1e9)
        for name, n_bytes in (("compressed", packed), ("uncompressed", whole))
    }
    return {"keep": keep, "context": context, "memory_gb": memory_gb} | counted


def _time_pages(
    shape: Shape, counts: dict[float, dict[str, dict[int, int]]], contexts: Sequence[int], batches: Sequence[int],
    turn: int, device: torch.device, dtype: torch.dtype,
) -> tuple[list[PagedTiming], list[ChunkTiming]]:  # fmt: skip
    if device.type != "cuda" or turn % TILE_TOKENS:
        raise OptionError(f"--pages times kernels of a GPU, over keys in turns of a multiple of {TILE_TOKENS} tokens.")
    paged, chunks = [], []
    for keep, parts in counts.items():
        blocks, site = blocks_of_page(keep), (parts["key"], parts["value"])
        for context in contexts:
            for batch in batches:
                if _fits(shape, context, batch, device, dtype):
                    paged.append(
                        time_pages(
                            shape, *site, keep=keep, context=context, batch=batch, turn=turn, page_blocks=blocks,
                            device=device, dtype=dtype,
                        )
                    )  # fmt: skip
        pool = random_pool(
            shape, *site, context=min(max(contexts), 32768), batch=1, turn=turn, page_blocks=blocks, device=device,
            dtype=dtype,
        )  # fmt: skip
        chunks.append(time_chunk(pool, keep=keep, n_new=2048))
    return paged, chunks


def _workloads(
    output: Path | None, name: str, keeps: Sequence[float], ranks_only: bool, turn: int
) -> tuple[Shape, dict[float, dict[str, dict[int, int]]], int]:
    """Return the shape, {keep: {"key" and "value": {bits: components}}} and the turn, as asked for or of output."""
    if output is not None:
        shape, keys, values, turn = shape_of_output(output)
        keep = (_bits(keys) + _bits(values)) / (32 * shape.width)
        return shape, {keep: {"key": keys, "value": values}}, turn
    if name not in SHAPES:
        raise OptionError(
            f"there is no shape {name}. Choose one of {', '.join(SHAPES)}, or name a compressed checkpoint."
        )
    shape = SHAPES[name]
    at_a_time = components_at_a_time(shape, turn)
    counts = {keep: typical_counts(shape.width, keep, ranks_only=ranks_only, at_a_time=at_a_time) for keep in keeps}
    return shape, {keep: {"key": c, "value": c} for keep, c in counts.items()}, turn


def _bits(counts: dict[int, int]) -> int:
    return sum(b * n for b, n in counts.items()) + (GAIN_BITS if min(counts) < 16 else 0)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name} is no device. Choose auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: torch sees no GPU here. Use --device cpu.")
    return device


def _fits(shape: Shape, context: int, batch: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the uncompressed cache of this combination takes at most 60% of the memory (2 GB on a CPU)."""
    n_bytes = 2 * batch * context * shape.width * dtype.itemsize
    if device.type == "cuda":
        return n_bytes < 0.6 * float(torch.cuda.get_device_properties(device).total_memory)
    return n_bytes <= 2e9
