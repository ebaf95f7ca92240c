"""Scores of continuations: batched, alone, from plain logits, and from real decoding with the compressed cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import kvcompress
from kvcompress.errors import OptionError
from kvcompress.evaluate import scoring
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.scoring import Pair, Score, compressed_share, encode_pair, score_pairs
from kvcompress.evaluate.sides import both_sides
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attach_plan, attachment_of
from tests.tiny_models import random_ids


@pytest.fixture
def attached(tiny_model: Any, tiny_plan: Any) -> Any:
    def make(family: str = "llama-gqa", **changes: Any) -> Any:
        options = {"keep": 0.5, "sinks": 2, "recent": 1, "policy": "uniform", "ranks_only": True} | changes
        return attach_plan(tiny_model(family), *tiny_plan(family, **options))

    return make


@pytest.fixture
def tokenizer(tiny_checkpoint: Any) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("llama-gqa"))


def pairs_of(*lengths: tuple[int, int]) -> list[Pair]:
    ids = [random_ids(1, a + b, seed=i)[0].tolist() for i, (a, b) in enumerate(lengths)]
    return [Pair(tuple(x[:a]), tuple(x[a:])) for x, (a, _) in zip(ids, lengths, strict=True)]


PAIRS = pairs_of((20, 4), (3, 1), (61, 9), (8, 28), (1, 2), (80, 1))


def decoded(model: Any, pair: Pair, **cache: Any) -> Score:
    """Return the score of a continuation that the model reads token by token."""
    ids = torch.tensor([pair.context + pair.continuation])
    with torch.no_grad():
        logits = torch.cat([model(token, **cache).logits for token in ids[:, :-1].split(1, 1)], 1)
    p = logits[0, len(pair.context) - 1 :].double().log_softmax(-1)
    labels = torch.tensor(pair.continuation)
    return Score(float(p.gather(-1, labels[:, None]).sum()), bool((p.argmax(-1) == labels).all()))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "phi3-partial", "smollm3", "mistral-sliding"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_batch_says_what_each_says_alone(attached: Any, family: str, side: int) -> None:
    one = both_sides(attached(family))[side]
    together = score_pairs(one, PAIRS, batch_size=4)
    for pair, score in zip(PAIRS, together, strict=True):
        (alone,) = score_pairs(one, [pair])
        assert score.logprob == pytest.approx(alone.logprob, rel=1e-4)
        assert score.is_greedy == alone.is_greedy


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
@pytest.mark.parametrize("options", [{"recent": 0}, {"recent": 1}, {"ranks_only": False, "keep": 0.125}])
def test_scores_are_those_of_real_decoding(attached: Any, family: str, options: dict[str, Any]) -> None:
    """A batch of mixed lengths, scored in parallel, against one token after the other with the real cache."""
    model = attached(family, **options)
    original, compressed = both_sides(model)
    compressed = replace(compressed, block=BLOCK_TOKENS)
    exact, coded = (score_pairs(side, PAIRS, batch_size=3) for side in (original, compressed))
    for pair, score in zip(PAIRS, coded, strict=True):
        real = decoded(model, pair, past_key_values=attachment_of(model).new_cache())
        assert score.logprob == pytest.approx(real.logprob, rel=1e-3, abs=1e-3)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(exact, coded, strict=True)) > 0.1


def test_the_original_is_the_plain_model(attached: Any, tiny_model: Any) -> None:
    plain = tiny_model("llama-gqa")
    for pair, score in zip(PAIRS, score_pairs(both_sides(attached())[0], PAIRS), strict=True):
        ids = torch.tensor([pair.context + pair.continuation])
        with torch.no_grad():
            p = plain(ids[:, :-1]).logits[0, len(pair.context) - 1 :].double().log_softmax(-1)
        assert score.logprob == pytest.approx(float(p.gather(-1, ids[0, len(pair.context) :, None]).sum()), rel=1e-4)


def test_greedy_continuations_are_known_as_such(attached: Any) -> None:
    side = both_sides(attached())[1]
    context = PAIRS[2].context
    written: tuple[int, ...] = ()
    for _ in range(5):
        hidden = side.hidden_states(torch.tensor([context + written]))
        written += (int(side.model.lm_head(hidden[0, -1]).argmax()),)
    other = (*written[:4], (written[4] + 1) % 320)
    scores = score_pairs(side, [Pair(context, written), Pair(context, other), PAIRS[0]])
    assert [score.is_greedy for score in scores] == [True, False, False]


def test_long_inputs_lose_their_beginning(tiny_checkpoint: Any, tiny_model: Any, attached: Any) -> None:
    model = attached()
    model.config.max_position_embeddings = 16
    side = both_sides(model)[0]
    (pair,) = pairs_of((30, 5))
    cut = Pair(pair.context[-12:], pair.continuation)  # 17 tokens, of which the model reads 16
    assert score_pairs(side, [pair])[0].logprob == pytest.approx(score_pairs(side, [cut])[0].logprob, rel=1e-5)
    with pytest.raises(OptionError, match="exceeds the model's context"):
        score_pairs(side, pairs_of((3, 17)))


def test_logits_come_in_slices(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    side = both_sides(attached())[1]
    expected = score_pairs(side, PAIRS)
    monkeypatch.setattr(scoring, "_LOGIT_ROWS", 2)
    monkeypatch.setattr(scoring, "_BATCH_TOKENS_CPU", 50)
    for a, b in zip(score_pairs(side, PAIRS), expected, strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=1e-4)


def test_empty_sides_are_refused(attached: Any) -> None:
    for pair in (Pair((), (1,)), Pair((1,), ())):
        with pytest.raises(OptionError, match="empty context or continuation"):
            score_pairs(both_sides(attached())[0], [pair])


def test_pairs_are_split_where_the_text_is(tokenizer: Any) -> None:
    whole = tokenizer.encode("The river was cold")
    pair = encode_pair(tokenizer, "The river", " was cold")
    assert list(pair.context + pair.continuation) == whole
    assert tokenizer.decode(pair.continuation) == " was cold"
    assert encode_pair(tokenizer, "The river ", "was cold") == pair  # the space counts to the continuation
    alone = encode_pair(tokenizer, "", "The river")
    assert alone == Pair((tokenizer.bos_token_id,), tuple(tokenizer.encode("The river")))


def test_share_that_is_seen_compressed(attached: Any) -> None:
    model = attached()  # 2 sinks, and a query sees itself and the token before it exactly
    exact, coded = both_sides(model)
    # the 5 tokens of the context are positions 0..4; the scored ones are predicted at 4 and 5
    assert compressed_share(coded, pairs_of((5, 2))) == pytest.approx((1 + 2) / (5 + 6))
    assert compressed_share(exact, pairs_of((5, 2))) == 0
    in_blocks = replace(coded, block=BLOCK_TOKENS)  # 32 tokens are encoded once the query at position 33 comes
    assert compressed_share(in_blocks, pairs_of((33, 2))) == pytest.approx((0 + 30) / (33 + 34))
    assert compressed_share(both_sides(model, recent=100)[1], PAIRS) == 0


def test_answers_survive_a_kill(attached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides, file = both_sides(attached()), tmp_path / "deep" / "answers.jsonl"
    with Answers(file) as first:
        expected = first.scores(sides[0], PAIRS[:4])
    with file.open("a") as unfinished:
        unfinished.write('["original-half a li')
    asked = []

    def counted(side: Any, pairs: Any, **options: Any) -> Any:
        asked.append(len(pairs))
        return score_pairs(side, pairs, **options)

    monkeypatch.setattr("kvcompress.evaluate.answers.score_pairs", counted)
    with Answers(file) as second:
        assert second.scores(sides[0], PAIRS)[:4] == expected
        assert second.scores(sides[1], PAIRS) != second.scores(sides[0], PAIRS)
    assert asked == [2, 6, 0]  # the first four are known; the other side's answers are its own
    assert len(file.read_text().splitlines()) == 1 + 2 * len(PAIRS)
    with Answers(file) as third:
        assert third.scores(sides[0], PAIRS)[:4] == expected


def test_a_file_of_answers_is_one_runs_at_a_time(tmp_path: Path) -> None:
    """Lines of two runs would lie in each other; what failed to open holds nothing."""
    file = tmp_path / "answers.jsonl"
    with Answers(file):
        with pytest.raises(OptionError, match="another run is writing answers"):
            Answers(file)
        before = file.read_bytes()
    assert file.read_text().startswith('{"format"') and file.read_bytes().startswith(before)
    file.write_text("no json\n")
    for _ in range(2):
        with pytest.raises(OptionError, match="is no file of answers"):
            Answers(file)


def test_the_same_request_is_asked_once(attached: Any) -> None:
    seen: list[tuple[int, int]] = []
    side = both_sides(attached())[0]
    scores = Answers().scores(side, [PAIRS[0], PAIRS[1], PAIRS[0]], progress=lambda *x: seen.append(x))
    assert scores[0] == scores[2] and seen == [(3, 3)]


@pytest.mark.parametrize("content", ['{"text": "a book"}\n', "no json\n", '{"format": "kvcompress answers"', "\xff\n"])
def test_another_file_is_no_file_of_answers(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(OptionError, match="is no file of answers"):
        Answers(file)
    assert file.read_bytes() == content.encode("latin-1")


def test_a_folded_model_is_a_side_too(tiny_checkpoint: Any, tiny_model: Any, tmp_path: Path) -> None:
    options = CompressOptions(metric="weights", key_basis="frequency", policy="uniform", keep=0.5, folded=True)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", options)
    model = kvcompress.load(tmp_path / "out")
    with pytest.raises(OptionError, match="original"):
        both_sides(model)
    _, side = both_sides(model, original=tiny_model("llama-gqa"))
    for pair, score in zip(PAIRS, score_pairs(side, PAIRS, batch_size=3), strict=True):
        real = decoded(model, pair, past_key_values=side.new_cache())
        assert score.logprob == pytest.approx(real.logprob, rel=1e-3, abs=1e-3)
