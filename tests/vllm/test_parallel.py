"""Two ranks, each with the maps of its own heads, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress.model.model_spec import Site
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


@pytest.mark.parametrize("slow_here", [False, True])
def test_ranks_attend_in_the_reference_where_one_has_to(slow_here: bool, monkeypatch: Any) -> None:
    """They encode the same blocks at once, so one that encoded them otherwise would wait for the others for ever."""
    from kvcompress.vllm import layers

    asked: list[float] = []

    def with_a_rank_that_is_slow(x: torch.Tensor) -> torch.Tensor:
        asked.append(float(x[0]))
        return x + 1

    monkeypatch.setattr(layers, "sum_over_ranks", with_a_rank_that_is_slow)
    own, device = "its rows have no tiles" if slow_here else None, torch.device("cpu")
    empty: Any = {}
    shared = layers.CompressedModel(empty, {}, {}, {}, {}, shared=frozenset({Site(0, "key")}))
    assert shared.agree(own, device) == shared.agree(None, device) == (own or shared.slow) and shared.slow
    assert asked == [float(slow_here)]  # once
    alone = layers.CompressedModel(empty, {}, {}, {}, {})
    assert alone.agree(own, device) == own and len(asked) == 1
