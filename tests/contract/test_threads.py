"""One attached model, many threads: what belongs to a call stays with the call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.runtime.attach import attach_plan, attachment_of
from tests.tiny_models import PAD, random_ids

N_THREADS, N_ROUNDS = 8, 50


@pytest.fixture
def model(tiny_model: Any, tiny_plan: Any) -> Any:
    return attach_plan(tiny_model("llama-gqa"), *tiny_plan("llama-gqa", keep=0.2, recent=3, sinks=2))


def generating(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    mask = (ids != PAD).long()
    return lambda: model.generate(ids, attention_mask=mask, **options)


def evaluating(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad(), attachment_of(model).simulated(sinks=2, recent=3):
            return model(ids, use_cache=False).logits

    return run


def reading(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits  # exact, beside those that are simulated

    return run


def test_every_thread_gets_what_it_gets_alone(model: Any, tiny_model: Any) -> None:
    """Prompts of different lengths, padded ones, evaluation, exact runs, and a model that is not attached."""
    detached = tiny_model("qwen2")
    padded = random_ids(2, 37, seed=5)
    padded[0, :9] = PAD
    work = [
        generating(model, random_ids(1, 33, seed=0)),
        generating(model, random_ids(2, 50, seed=1)),
        generating(model, random_ids(1, 71, seed=2)),
        generating(model, padded),
        evaluating(model, random_ids(1, 45, seed=3)),
        evaluating(model, random_ids(3, 20, seed=4)),
        reading(model, random_ids(1, 45, seed=3)),
        generating(detached, random_ids(1, 40, seed=6)),
    ]
    assert len(work) == N_THREADS
    alone = [run() for run in work]
    assert not torch.allclose(alone[4], alone[6])
    barrier, wrong = threading.Barrier(N_THREADS), []

    def rounds(place: int) -> None:
        torch.set_num_threads(1)  # as in the main thread: sums are added up in one order
        try:
            for round_ in range(N_ROUNDS):
                barrier.wait(timeout=120)
                run = (place + round_) % N_THREADS  # every thread does everything
                if not torch.equal(work[run](), alone[run]):
                    wrong.append((place, round_, run))
        except BaseException as error:
            wrong.append((place, error))
            barrier.abort()

    threads = [threading.Thread(target=rounds, args=(place,)) for place in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
