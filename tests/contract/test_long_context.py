"""Retrieval prompts and cells, perplexity by position, and greedy agreement: against direct computation."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import kvcompress
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, OptionError
from kvcompress.evaluate.generation import evaluate_generation
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.evaluate.positions import evaluate_positions
from kvcompress.evaluate.retrieval import evaluate_retrieval, make_prompts
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.planning import make_plan
from kvcompress.runtime.attach import attach_plan, attachment_of, detach


@pytest.fixture
def attached(tiny_checkpoint: Any, tiny_model: Any, tiny_moments: Any) -> Any:
    def make(family: str = "llama-gqa", **changes: Any) -> tuple[Any, Any]:
        options = CompressOptions(
            **{"keep": 0.5, "sinks": 2, "recent": 4, "policy": "uniform", "ranks_only": True} | changes
        )
        with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
            plan, maps, _ = make_plan(checkpoint, tiny_moments(family), options)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        model = tiny_model(family)
        model.config.max_position_embeddings = 2048
        return attach_plan(model, plan, maps), tokenizer

    return make


def test_prompts_have_the_length_and_hold_the_answer(attached: Any, text_file: Path) -> None:
    _, tokenizer = attached()
    prompts = make_prompts(tokenizer, str(text_file), [500, 900], [0, 0.5, 1], n_prompts=2, n_keys=3)
    assert len(prompts) == 2 * 2 * 3 * 2
    for prompt in prompts:
        assert len(prompt.pair.context) + len(prompt.pair.continuation) == prompt.length
        context, answer = tokenizer.decode(prompt.pair.context), tokenizer.decode(prompt.pair.continuation).strip()
        assert context.count(answer) == 2 and answer.isdigit()
        n_keys = {"passkey": 1, "multikey": 3}[prompt.kind]
        assert context.count("Remember it") == n_keys
        place = context.index(answer) / len(context)
        # the introduction, the question and the keys themselves take their part of the prompt
        assert abs(place - prompt.depth) < 0.45, (prompt.depth, place)
        asked = context.rsplit("What is the pass key", 1)[1].split("?")[0]
        assert f"The pass key{asked} is {answer}." in context
    assert len({prompt.pair for prompt in prompts}) == len(prompts)
    assert prompts == make_prompts(tokenizer, str(text_file), [500, 900], [0, 0.5, 1], n_prompts=2, n_keys=3)


def test_deeper_keys_come_later(attached: Any, text_file: Path) -> None:
    _, tokenizer = attached()
    places = []
    for depth in (0, 0.3, 0.6, 1):
        (prompt, _) = make_prompts(tokenizer, str(text_file), [1000], [depth], n_prompts=1)
        context = tokenizer.decode(prompt.pair.context)
        places.append(context.index(tokenizer.decode(prompt.pair.continuation).strip()))
    assert places == sorted(places)


def test_cells_are_what_the_logits_say(attached: Any, text_file: Path, tmp_path: Path) -> None:
    model, tokenizer = attached()
    options = {"lengths": [400, 500], "depths": [0.2, 0.8], "n_prompts": 3}
    result = evaluate_retrieval(model, tokenizer, str(text_file), **options, answers=tmp_path / "answers.jsonl")
    assert [(c.kind, c.length, c.depth, c.n) for c in result.cells] == [
        (kind, length, depth, 3) for kind in ("passkey", "multikey") for length in (400, 500) for depth in (0.2, 0.8)
    ]
    prompts = make_prompts(tokenizer, str(text_file), [400], [0.2], n_prompts=3)[:3]
    sums = [0.0, 0.0]
    for prompt in prompts:
        ids = torch.tensor([prompt.pair.context + prompt.pair.continuation])
        labels = torch.tensor(prompt.pair.continuation)[:, None]
        with torch.no_grad():
            exact = model(ids, use_cache=False).logits
            with attachment_of(model).simulated(sinks=2, recent=4):
                coded = model(ids, use_cache=False).logits
        for i, logits in enumerate((exact, coded)):
            sums[i] += float(logits[0, -len(labels) - 1 : -1].log_softmax(-1).gather(-1, labels).sum())
    assert result.cells[0].original_logprob == pytest.approx(sums[0] / 3, rel=1e-4)
    assert result.cells[0].compressed_logprob == pytest.approx(sums[1] / 3, rel=1e-4)
    assert result.cells[0].original_logprob != pytest.approx(result.cells[0].compressed_logprob, abs=0.01)
    assert result.logprob["passkey"].n == result.found["passkey"].n == 12
    again = evaluate_retrieval(model, tokenizer, str(text_file), **options, answers=tmp_path / "answers.jsonl")
    assert again == result


def test_bad_retrieval_requests(attached: Any, text_file: Path, tmp_path: Path) -> None:
    def fails(**options: Any) -> pytest.ExceptionInfo[Any]:
        with pytest.raises(OptionError) as error:
            evaluate_retrieval(*attached(), str(text_file), **{"lengths": [400]} | options)
        return error

    assert "at most 2048 tokens; 4096 were asked for" in str(fails(lengths=[512, 4096]).value)
    assert "256 tokens or more" in str(fails(lengths=[100]).value)
    assert "256 tokens or more" in str(fails(lengths=[]).value)
    assert "between 0" in str(fails(depths=[1.5]).value)
    assert "2 to 11 keys" in str(fails(n_keys=12).value)
    assert "does not fit into 400 tokens" in str(fails(n_keys=11).value)
    (tmp_path / "short.txt").write_text("The river.")
    with pytest.raises(CalibrationError, match="too little text"):
        evaluate_retrieval(*attached(), str(tmp_path / "short.txt"), lengths=[400])


def test_positions_add_up_to_the_whole(attached: Any, text_file: Path) -> None:
    model, tokenizer = attached()
    result = evaluate_positions(model, tokenizer, str(text_file), seq_len=301, max_windows=3)
    whole = evaluate(model, tokenizer, str(text_file), seq_len=301, max_windows=3)
    for bins in (result.quarters, result.doubling):
        assert bins[0].start == 0 and bins[-1].stop == 300
        assert all(a.stop == b.start for a, b in pairwise(bins))
        for name in ("original", "compressed"):
            mean = sum((b.stop - b.start) * math.log(getattr(b, name)) for b in bins) / 300
            assert math.exp(mean) == pytest.approx(whole.perplexity[name], rel=1e-5)
    assert [(b.start, b.stop) for b in result.doubling] == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert result.last_over_first == pytest.approx(result.quarters[3].ratio / result.quarters[0].ratio)
    assert result.last_over_first_stderr is not None and result.last_over_first_stderr > 0
    assert result.quarters[3].ratio != pytest.approx(1, abs=1e-3)


def test_positions_within_the_window_lose_nothing(attached: Any, text_file: Path) -> None:
    result = evaluate_positions(*attached(), str(text_file), seq_len=301, max_windows=2, recent=64)
    assert result.doubling[0].ratio == pytest.approx(1, abs=1e-5)
    assert result.doubling[2].ratio != pytest.approx(1, abs=1e-4)


def test_one_window_has_no_error(attached: Any, text_file: Path) -> None:
    result = evaluate_positions(*attached(), str(text_file), seq_len=50, max_windows=1)
    assert result.last_over_first_stderr is None and result.quarters[0].ratio_stderr is None
    with pytest.raises(OptionError, match="at most 2048 tokens"):
        evaluate_positions(*attached(), str(text_file), seq_len=4096)


def test_agreement_is_that_of_the_texts(attached: Any, text_file: Path) -> None:
    """Against transformers' own generate, once with the attached cache and once detached."""
    model, tokenizer = attached()
    result = evaluate_generation(
        model, tokenizer, str(text_file), prompt_tokens=80, new_tokens=12, n_prompts=5, batch_size=2
    )
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][:400]).view(5, 80)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 319, "suppress_tokens": []}
    written = []
    for _ in range(2):
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 80:]
        written.append([row.tolist() for row in texts])
        detach(model)
    coded, exact = written
    prefixes = [next((i for i in range(12) if a[i] != b[i]), 12) for a, b in zip(exact, coded, strict=True)]
    assert list(result.prefixes) == prefixes
    assert result.common_prefix == pytest.approx(sum(prefixes) / 5)
    same = [x == y for a, b in zip(exact, coded, strict=True) for x, y in zip(a, b, strict=True)]
    assert result.same_place == pytest.approx(sum(same) / 60)
    assert result.common_prefix < 12 and 0 < result.next_token < 1


def test_an_exact_cache_continues_alike(attached: Any, text_file: Path) -> None:
    result = evaluate_generation(*attached(recent=100), str(text_file), prompt_tokens=40, new_tokens=12, n_prompts=3)
    assert (result.identical, result.same_place, result.next_token, result.median_prefix) == (1, 1, 1, 12)
    with pytest.raises(OptionError, match="at most 2048 tokens"):
        evaluate_generation(*attached(), str(text_file), prompt_tokens=2000, new_tokens=100)


def test_a_folded_model_is_measured_against_its_original(
    tiny_checkpoint: Any, tiny_model: Any, text_file: Path, tmp_path: Path
) -> None:
    options = CompressOptions(metric="weights", key_basis="frequency", policy="uniform", keep=0.5, folded=True)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options)
    model, tokenizer = kvcompress.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    original = tiny_model("llama-gqa")
    result = evaluate_positions(model, tokenizer, str(text_file), seq_len=101, max_windows=2, original=original)
    assert result.quarters[0].ratio != pytest.approx(1, abs=1e-3)
    agreement = evaluate_generation(
        model, tokenizer, str(text_file), prompt_tokens=40, new_tokens=8, n_prompts=2, original=original
    )
    assert 0 <= agreement.common_prefix < 8
