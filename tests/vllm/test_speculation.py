"""Several query tokens a step: n-gram and draft-model speculation write what is written without. At a session's end:
n-gram speculation loads numba, over which a later vLLM for CPUs stumbles in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompress.errors import KVCompressError
from tests.vllm.conftest import generate, greedy, new_tokens, prompts


def test_a_compressed_draft_model(source: Path, compressed: Callable[..., Path], engine: Any) -> None:
    draft = {"method": "draft_model", "model": str(compressed(keep=0.25)), "num_speculative_tokens": 3}
    with pytest.raises(KVCompressError, match="draft model"):
        engine(source, speculative_config=draft)


def test_which_model_drafts() -> None:
    from kvcompress.vllm.hooks import drafts

    def config(model: str, draft: str | None) -> Any:
        speculative = SimpleNamespace(draft_model_config=draft, target_model_config="target")
        return SimpleNamespace(model_config=model, speculative_config=speculative)

    assert drafts(config("small", "small")) and not drafts(config("target", "small"))
    assert not drafts(config("target", "target"))  # n-grams
    assert not drafts(SimpleNamespace(model_config="target", speculative_config=None))


def test_a_draft_model(source: Path, full_rank: Path, engine: Any, plain: Any) -> None:
    ids = prompts(300, 40, 1, 97)
    draft = {"method": "draft_model", "model": str(source), "num_speculative_tokens": 3}
    llm = engine(full_rank, speculative_config=draft, disable_log_stats=False)
    outputs = generate(llm, ids, 60)
    assert new_tokens(outputs) == [greedy(plain, x, 60) for x in ids]
    # Three tokens of the same model are all accepted, so it takes about a quarter of the steps.
    accepted = [m for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"]
    assert accepted and accepted[0].value > 100


def test_ngrams(full_rank: Path, engine: Any, plain: Any) -> None:
    pattern = prompts(12)[0]
    ids = [pattern * 8, pattern * 30, prompts(40, seed=9)[0]]
    speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = engine(full_rank, speculative_config=speculative)
    assert new_tokens(generate(llm, ids, 120)) == [greedy(plain, x, 120) for x in ids]
