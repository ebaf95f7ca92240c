"""`eval --engine vllm` and `bench --engine vllm` with the engine itself, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvcompress.bench.engine import EngineOptions, EngineWorkload, time_checkpoint, time_engine
from kvcompress.evaluate.engine import evaluate_engine
from kvcompress.evaluate.engine_tasks import EngineAnswerer
from kvcompress.evaluate.scoring import Pair
from kvcompress.runtime.attach import attachment_of
from tests.tiny_models import prose
from tests.vllm.conftest import greedy, prompts

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


@torch.no_grad()
def test_questions_are_answered_as_by_the_run_time(compressed: Callable[..., Path], run_time: Any) -> None:
    directory = compressed(keep=0.25)
    model = run_time(directory)
    contexts = prompts(150, 40, 1)
    own = [greedy(model, x, 12) for x in contexts]
    pairs = [Pair(tuple(x), tuple(y)) for x, y in zip(contexts, own, strict=True)]
    pairs += [Pair(tuple(contexts[0]), tuple(prompts(9, seed=7)[0]))]
    answerer = EngineAnswerer(directory, max_tokens=512, arguments=SMALL | {"dtype": "float32"})
    scores = answerer.scores(pairs)
    assert [score.is_greedy for score in scores] == [True, True, True, False]
    for pair, score in zip(pairs, scores, strict=True):
        assert score.logprob == pytest.approx(_written_logprob(model, pair), rel=1e-3, abs=1e-3)
    # The model writes bytes that are no text; those of one prompt are enough to see where it ends.
    whole = AutoTokenizer.from_pretrained(directory).decode(own[0], skip_special_tokens=True)
    stop = whole[len(whole) // 2 :][:3]
    (text,) = answerer.texts(contexts[:1], n_new=12, stop=[stop])
    assert stop and text.strip() == whole.split(stop)[0].strip()


def _written_logprob(model: Any, pair: Pair) -> float:
    """Return the log-likelihood of a continuation that the run time decodes token by token."""
    cache, read, total = attachment_of(model).new_cache(), torch.tensor([pair.context]), 0.0
    for token in pair.continuation:
        logits = model(input_ids=read, past_key_values=cache).logits[0, -1]
        total, read = total + float(logits.log_softmax(-1)[token]), torch.tensor([[token]])
    return total


def test_caches_are_timed() -> None:
    workload = EngineWorkload(((2, 400), (None, 400)), prompt=300, continuation=100)
    rows = time_engine(
        "tiny", [0.25], workload, caches=["bf16"], turn=256,
        options=EngineOptions("cpu", arguments=SMALL | {"num_gpu_blocks_override": 60}),
    )  # fmt: skip
    bf16, ours = rows
    assert bf16.failure is None and ours.failure is None
    assert bf16.start_seconds and ours.warm_up_seconds
    assert [step["most"] for step in ours.steps] == [False, True]
    assert all(step["milliseconds"] > 0 for step in ours.steps)
    assert ours.steps[0]["batch"] == 2
    assert ours.first_token_seconds is not None and ours.continued_seconds is not None


def test_a_checkpoint_is_timed(compressed: Callable[..., Path]) -> None:
    """With its own weights, as it is, and by vLLM's own cache with its plan left out."""
    options = EngineOptions("cpu", arguments=SMALL)
    rows = time_checkpoint(compressed(keep=0.25), EngineWorkload(((1, 400),)), caches=["bf16"], options=options)
    assert [(row.cache, row.failure, len(row.steps)) for row in rows] == [("bf16", None, 1), ("kvcompress", None, 1)]
    assert rows[1].tokens_that_fit > rows[0].tokens_that_fit
