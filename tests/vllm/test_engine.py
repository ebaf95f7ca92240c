"""vLLM runs compressed checkpoints: the tokens of the run time in transformers, whatever the engine does meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import check_twice, generate, greedy, new_tokens, prompts

N_NEW = 40


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.25},
        {"keep": 0.125, "turn": 256},
        {"keep": 0.25, "key_basis": "frequency"},
        {"keep": 0.5, "ranks_only": True, "recent": 0, "sinks": 0},
    ],
    ids=["latent", "turns", "frequency", "no window"],
)
def test_the_same_tokens_as_the_run_time(
    options: dict[str, Any], compressed: Callable[..., Path], engine: Any, run_time: Any
) -> None:
    directory = compressed(**options)
    model = run_time(directory)
    check_twice(engine(directory), model, prompts(300, 70, 520, 1, 97, 256, 33), N_NEW)


def test_chunks_of_64_are_the_run_time_s(compressed: Callable[..., Path], engine: Any, run_time: Any) -> None:
    directory = compressed(keep=0.25)
    model, ids = run_time(directory), prompts(300, 65, 130)
    llm = engine(directory, max_num_batched_tokens=64, max_num_seqs=1, enable_prefix_caching=False)
    expected = [greedy(model, x, N_NEW, list(range(64, len(x), 64))) for x in ids]
    assert new_tokens(generate(llm, ids, N_NEW)) == expected


def test_maps_beside_an_ordinary_model(
    source: Path, compressed: Callable[..., Path], engine: Any, run_time: Any, monkeypatch: Any
) -> None:
    directory = compressed(keep=0.25)
    ids = prompts(150)
    expected = [greedy(run_time(directory), x, N_NEW) for x in ids]
    assert (
        new_tokens(generate(engine(source, additional_config={"kvcompress": str(directory)}), ids, N_NEW)) == expected
    )
    monkeypatch.setenv("KVCOMPRESS_MAPS", str(directory))
    assert new_tokens(generate(engine(source), ids, N_NEW)) == expected


class TestNothingLost:
    """Every site coded, at full rank: the tokens are those of the uncompressed model, whatever is scheduled how."""

    def test_unequal_lengths_in_batches_that_grow_and_shrink(self, full_rank: Path, engine: Any, plain: Any) -> None:
        ids = prompts(1, 300, 33, 64, 31, 520, 97, 2)
        assert new_tokens(generate(engine(full_rank), ids, N_NEW)) == [greedy(plain, x, N_NEW) for x in ids]

    def test_long_generation(self, full_rank: Path, engine: Any, plain: Any) -> None:
        ids = prompts(30, 90)
        llm = engine(full_rank)
        expected = [greedy(plain, x, 400) for x in ids]
        assert new_tokens(generate(llm, ids, 400)) == expected
        # What was generated is found as a prefix, too.
        longer = [x + y for x, y in zip(ids, expected, strict=True)]
        again = generate(llm, longer, N_NEW)
        assert all(o.num_cached_tokens >= 256 for o in again)
        assert new_tokens(again) == [greedy(plain, x, N_NEW) for x in longer]

    @pytest.mark.parametrize("caching", [True, False])
    def test_shared_prefixes(self, caching: bool, full_rank: Path, engine: Any, plain: Any) -> None:
        start = prompts(300, seed=50)[0]
        ids = [start + x for x in prompts(5, 70, 1, 300)] + [start[:256], start[:257]]
        expected = [greedy(plain, x, N_NEW) for x in ids]
        llm = engine(full_rank, enable_prefix_caching=caching)
        for _ in range(2):
            outputs = generate(llm, ids, N_NEW)
            assert new_tokens(outputs) == expected
            assert any(o.num_cached_tokens for o in outputs) == caching

    def test_chunks_that_mix_with_generation(self, full_rank: Path, engine: Any, plain: Any) -> None:
        ids = prompts(300, 70, 520, 1, 200, 33)
        llm = engine(full_rank, max_num_batched_tokens=80)
        assert new_tokens(generate(llm, ids, N_NEW)) == [greedy(plain, x, N_NEW) for x in ids]

    def test_preemption(self, full_rank: Path, engine: Any, plain: Any, monkeypatch: Any) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        preempted, original = [], Scheduler._preempt_request
        monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), original(*a, **k))[1])
        ids = prompts(60, 200, 130, 90)
        llm = engine(full_rank, num_gpu_blocks_override=40, max_model_len=512)
        assert new_tokens(generate(llm, ids, 150)) == [greedy(plain, x, 150) for x in ids]
        assert preempted, "the cache was large enough for all: the test shows nothing"

    def test_several_samples_of_a_prompt(self, full_rank: Path, engine: Any, plain: Any) -> None:
        ids = prompts(300, 40)
        outputs = generate(engine(full_rank), ids, N_NEW, n=3, temperature=1.0, top_k=1)
        for output, x in zip(outputs, ids, strict=True):
            assert [list(o.token_ids) for o in output.outputs] == [greedy(plain, x, N_NEW)] * 3

    def test_200_requests_that_arrive_at_random(self, full_rank: Path, engine: Any, plain: Any) -> None:
        from vllm import SamplingParams

        rng = random.Random(0)
        ids = prompts(*(rng.randint(1, 200) for _ in range(200)), seed=100)
        n_new = [rng.randint(1, 24) for _ in ids]
        llm = engine(full_rank, max_num_seqs=8, max_num_batched_tokens=256).llm_engine
        waiting, found = list(range(200)), {}
        while waiting or llm.has_unfinished_requests():
            for i in [waiting.pop(0) for _ in range(min(len(waiting), rng.randint(0, 3)))]:
                sampling = SamplingParams(max_tokens=n_new[i], temperature=0.0, ignore_eos=True)
                llm.add_request(str(i), {"prompt_token_ids": ids[i]}, sampling)
            for output in llm.step():
                if output.finished:
                    found[int(output.request_id)] = list(output.outputs[0].token_ids)
        wrong = [i for i in range(200) if found[i] != greedy(plain, ids[i], n_new[i])]
        assert not wrong
