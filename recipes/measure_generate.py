"""Tokens a second of `generate` on a GPU: an attached model against DynamicCache, in one run, real prompts and all.

    python recipes/measure_generate.py --shape llama-3-8b --batch 8 --context 32768 --new-tokens 128

The model has random weights and the plan random maps, as in `kvcompress bench`; turns of 256 tokens and --keep as in
the default. A tokens-a-second figure is that of the tokens after the first, each waited for, so that it leaves
the prompt out; the prompt's own time stands beside it. Every row is the second of two runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch

import kvcompress
from kvcompress.bench.random_model import random_model, random_plan
from kvcompress.bench.workload import SHAPES, components_at_a_time, typical_counts
from kvcompress.runtime import attach as attach_module
from kvcompress.runtime.attach import attach_plan


class Clock:
    """A stopping criterion that stops nothing and notes when each token of a batch was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(model: Any, ids: torch.Tensor, n_new: int) -> dict[str, float]:
    """Return the seconds of the prompt, the tokens a second after it, and the median and slowest step."""
    for _ in range(2):
        gc.collect()
        if ids.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock = Clock()
        started = time.monotonic()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, stopping_criteria=[clock]
        )
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "prompt_seconds": clock.times[0] - started,
        "tokens_per_second": len(ids) * len(steps) / sum(steps),
        "median_milliseconds": 1e3 * statistics.median(steps),
        "slowest_milliseconds": 1e3 * max(steps),
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if ids.is_cuda else 0.0,
    }


def save_memory(model: Any, most: int = 4096) -> None:
    """Let prompts go through the wide layers in pieces: both caches then fit 80 GB, and a step is as it was."""
    for layer in model.model.layers:
        forward = layer.mlp.forward

        def in_pieces(x: torch.Tensor, forward: Any = forward) -> torch.Tensor:
            return forward(x) if x.shape[1] <= most else torch.cat([forward(part) for part in x.split(most, 1)], 1)

        layer.mlp.forward = in_pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--turn", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    shape, device, dtype = SHAPES[asked.shape], torch.device(asked.device), torch.bfloat16
    model = random_model(shape, device, dtype)
    save_memory(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.randint(1, shape.n_vocab, (asked.batch, asked.context), device=device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    row: dict[str, Any] = {"card": card, "torch": torch.__version__, **vars(asked)}
    counts = typical_counts(shape.width, asked.keep, at_a_time=components_at_a_time(shape, asked.turn))
    plan, maps = random_plan(shape, counts, counts, dtype, turn=asked.turn)
    attach_plan(model, plan, maps)
    caches = []
    new = attach_module.recorded_cache

    def recorded_cache(*args: Any) -> Any:
        caches[:] = [new(*args)]
        return caches[0]

    attach_module.recorded_cache = recorded_cache
    row["ours"] = timed(model, ids, asked.new_tokens)
    row["ours"]["replays"] = caches[0].n_replays if caches[0] is not None else 0
    row["ours"]["cache_gigabytes"] = caches[0].nbytes() / 1e9 if caches[0] is not None else None
    caches.clear()
    print(json.dumps(row), flush=True)
    kvcompress.detach(model)
    row["dynamic"] = timed(model, ids, asked.new_tokens)
    row["times"] = row["ours"]["tokens_per_second"] / row["dynamic"]["tokens_per_second"]
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
