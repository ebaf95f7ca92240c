"""Log-likelihoods of continuations, many at once: what multiple choice, cloze and retrieval tasks ask of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.evaluate.sides import Side
from kvcompress.model.head import logits_of

#: Padded tokens in one forward pass, so that long inputs come in smaller batches: on a CPU, and on a GPU.
_BATCH_TOKENS_CPU, _BATCH_TOKENS = 8192, 65536
#: Rows of logits held at once: 49,152 tokens of vocabulary in float32 are 200 MB.
_LOGIT_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Pair:
    """What a model is asked: token ids of a context, and of the continuation to be scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have produced it."""

    logprob: float
    is_greedy: bool


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Return the token ids of a context and a continuation, split as lm-eval splits them.

    Spaces at the end of the context count to the continuation, and both are tokenised together, so that a word is
    never torn apart. An empty context becomes the BOS token (EOS where there is none).
    """
    head_text = context.rstrip()
    if not head_text:
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        prefix = prefix_token(tokenizer)
        return Pair(tuple(ids[:1]), tuple(ids[1:])) if ids[:1] == [prefix] else Pair((prefix,), tuple(ids))
    head = encode_text(tokenizer, head_text)
    whole = encode_text(tokenizer, context + continuation)
    return Pair(tuple(head), tuple(whole[len(head) :]))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text with the tokenizer's own special tokens; a text that begins with BOS gets no second."""
    prefix = tokenizer.bos_token or tokenizer.eos_token
    begins = prefix is not None and text.startswith(prefix)
    return list(tokenizer.encode(text, add_special_tokens=False) if begins else tokenizer.encode(text))


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands before a text: BOS, or EOS where there is none. Raises OptionError."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise OptionError("the tokenizer has neither a BOS nor an EOS token, so nothing can stand before an empty context.")


def score_pairs(
    side: Side,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 64,
    on_score: Callable[[int, Score], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Return the score of each continuation, decode-faithful, in the order of `pairs`.

    Inputs longer than the model's context lose their beginning, as in lm-eval. Batches hold inputs of similar
    length, the longest first, padded on the right. batch_size: most inputs in one. on_score(index, score) hears of
    each score as soon as it is there. Raises OptionError for a pair with an empty side.
    """
    scores: list[Score | None] = [None] * len(pairs)
    done = 0
    for batch in _batches(side, pairs, batch_size):
        for index, score in zip(batch, _score_batch(side, [pairs[i] for i in batch]), strict=True):
            scores[index] = score
            if on_score:
                on_score(index, score)
        done += len(batch)
        if progress:
            progress(done, len(pairs))
    return [score for score in scores if score is not None]


def compressed_share(side: Side, pairs: Sequence[Pair]) -> float:
    """Return which share of all the tokens that scored tokens attend to is seen compressed: 0 for short inputs."""
    n_compressed = n_seen = 0
    for pair in pairs:
        n_input = min(len(pair.context) + len(pair.continuation) - 1, side.max_tokens)
        for position in range(n_input - len(pair.continuation), n_input):
            n_compressed += side.n_compressed(position)
            n_seen += position + 1
    return n_compressed / n_seen if n_seen else 0.0


def _batches(side: Side, pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of pairs that are scored together, the longest inputs first."""
    for pair in pairs:
        if not pair.context or not pair.continuation:
            raise OptionError("a request has an empty context or continuation. Check the task's file.")
        if len(pair.continuation) > side.max_tokens:
            raise OptionError(f"a continuation of {len(pair.continuation)} tokens exceeds the model's context.")
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].context) - len(pairs[i].continuation))
    limit = _BATCH_TOKENS_CPU if side.device.type == "cpu" else _BATCH_TOKENS
    start = 0
    while start < len(order):
        n = max(1, min(batch_size, limit // len(_input(side, pairs[order[start]]))))
        yield order[start : start + n]
        start += n


def _input(side: Side, pair: Pair) -> tuple[int, ...]:
    """Return what the model reads: all but the last token, from the left cut to the model's context."""
    return (pair.context + pair.continuation)[-(side.max_tokens + 1) : -1]


def _score_batch(side: Side, pairs: Sequence[Pair]) -> list[Score]:
    inputs = [_input(side, pair) for pair in pairs]
    width = max(len(ids) for ids in inputs)
    padded = torch.tensor([ids + (0,) * (width - len(ids)) for ids in inputs])
    lengths = [len(pair.continuation) for pair in pairs]
    rows = torch.cat([torch.arange(len(ids) - n, len(ids)) for ids, n in zip(inputs, lengths, strict=True)])
    batch = torch.arange(len(pairs)).repeat_interleave(torch.tensor(lengths))
    labels = torch.tensor([token for pair in pairs for token in pair.continuation], device=side.device)
    hidden = side.hidden_states(padded.to(side.device))[batch.to(side.device), rows.to(side.device)]
    logprobs, hits = label_logprobs(side.model, hidden, labels)
    per_pair = zip(logprobs.cpu().split(lengths), hits.cpu().split(lengths), strict=True)
    return [Score(float(p.double().sum()), bool(hit.all())) for p, hit in per_pair]


def label_logprobs(model: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log-likelihoods [n], float32, nats, and whether the label is the most likely token [n], bool).

    hidden: [n, d_model] final hidden states; labels: [n]. The logits of a few rows are held at a time.
    """
    logprobs, hits = [], []
    with torch.no_grad():
        for part, wanted in zip(hidden.split(_LOGIT_ROWS), labels.split(_LOGIT_ROWS), strict=True):
            p = logits_of(model, part[None])[0].float().log_softmax(-1)
            logprobs.append(p.gather(-1, wanted[:, None]).squeeze(-1))
            hits.append(p.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(hits)
