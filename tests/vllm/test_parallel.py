"""Two ranks, each with the maps of its own heads, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.vllm.source import read_source
from tests.vllm.conftest import generate, greedy, new_tokens, prompts


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank needs a core")
def test_the_same_tokens_as_the_run_time(
    compressed: Callable[..., Path], engine: Any, run_time: Any, monkeypatch: Any
) -> None:
    # Numbers, not codes: ranks add in another order, and a code may fall on the other side of a step.
    directory = compressed(keep=0.5, group=1, ranks_only=True)
    ranks = [maps.block.bincount().tolist() for maps in read_source(directory).maps.values()]
    assert any(one != other for one, other in ranks)  # of the two heads: rows of the two ranks differ
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model, ids = run_time(directory), prompts(300, 40, 1, 97)
    llm = engine(directory, tensor_parallel_size=2)
    assert new_tokens(generate(llm, ids, 40)) == [greedy(model, x, 40) for x in ids]
    # Each rank has as many bytes as one alone, for half of a token.
    assert 1.8 < tokens_that_fit(llm) / tokens_that_fit(engine(directory)) <= 2.1


def tokens_that_fit(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
