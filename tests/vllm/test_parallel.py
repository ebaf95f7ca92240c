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
def test_the_same_tokens_as_on_one_rank(
    compressed: Callable[..., Path], engine: Any, run_time: Any, monkeypatch: Any
) -> None:
    """Codes of few bits, whose gains each rank would choose otherwise by itself: other tokens then."""
    directory = compressed(keep=0.2, group=1)
    ranks = [maps.block.bincount(maps.bits.double()).tolist() for maps in read_source(directory).maps.values()]
    assert any(one != other for one, other in ranks)  # of the two heads: rows of the two ranks differ
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model, ids = run_time(directory), prompts(300, 40, 1, 97, 200, 150, 260, 130)
    llm, alone = engine(directory, tensor_parallel_size=2), engine(directory)
    expected = [greedy(model, x, 60) for x in ids]
    assert new_tokens(generate(llm, ids, 60)) == new_tokens(generate(alone, ids, 60)) == expected
    # Each rank has as many bytes as one alone, for half of a token.
    assert 1.8 < tokens_that_fit(llm) / tokens_that_fit(alone) <= 2.1


def tokens_that_fit(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
