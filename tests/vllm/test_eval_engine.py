"""`eval --engine vllm` and `bench --engine vllm` with the engine itself, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvcompress.bench.engine import EngineWorkload, time_engine
from kvcompress.evaluate.engine import evaluate_engine
from tests.tiny_models import prose

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4}


def test_the_engine_agrees_with_the_run_time(compressed: Callable[..., Path], run_time: Any, tmp_path: Path) -> None:
    directory = compressed(keep=0.25)
    text = tmp_path / "text.txt"
    text.write_text(prose(1500, seed=5), encoding="utf-8")
    found = evaluate_engine(
        run_time(directory), AutoTokenizer.from_pretrained(directory), directory, str(text),
        n_prompts=3, prompt_tokens=150, new_tokens=40, n_windows=2, seq_len=200, arguments=SMALL,
    )  # fmt: skip
    assert found.same_token >= 0.99
    assert abs(found.perplexity / found.run_time_perplexity - 1) < 0.002


def test_caches_are_timed() -> None:
    workload = EngineWorkload(((2, 400), (None, 400)), prompt=300, continuation=100)
    rows = time_engine(
        "tiny", [0.25], workload, caches=["bf16"], turn=256, device="cpu",
        arguments=SMALL | {"num_gpu_blocks_override": 60},
    )  # fmt: skip
    bf16, ours = rows
    assert bf16.failure is None and ours.failure is None
    assert [step["most"] for step in ours.steps] == [False, True]
    assert all(step["milliseconds"] > 0 for step in ours.steps)
    assert ours.steps[0]["batch"] == 2
    assert ours.first_token_seconds is not None and ours.continued_seconds is not None
