"""Retrieval from long contexts: a key hidden in a book, found again by the original and the compressed model?

Passkey retrieval as in Mohtashami and Jaggi (arXiv 2305.16300), over a book instead of a repeated sentence, and with
several keys of which one is asked for. Both models get the same tokens. The answer is scored under teacher forcing:
it counts as found if each of its tokens is the most likely one, which is when greedy decoding writes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from kvcompress.calibration.text import documents
from kvcompress.checkpoint.tokenizer import start_tokens
from kvcompress.errors import CalibrationError, OptionError
from kvcompress.evaluate.answers import Answers, request_key
from kvcompress.evaluate.paired import Paired, compare_paired
from kvcompress.evaluate.scoring import Pair, Score
from kvcompress.evaluate.sides import both_sides, check_length, dtype_name
from kvcompress.runtime.attach import attachment_of

DEFAULT_LENGTHS = (1024, 2048, 4096)
#: Not 1.0: there the key would lie within the exact window.
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)

_INTRO = "There are important facts hidden inside a long text. Find and remember them.\n\n"
_NAMES = ("Amsterdam", "Berlin", "Cairo", "Dublin", "Geneva", "Havana", "Lisbon", "Madrid", "Oslo", "Prague", "Rome")
_CHARS_PER_TOKEN = 8  # read at most this many characters a token wanted


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question: its kind ("passkey" or "multikey"), tokens in all, and where the key is (0 first, 1 last)."""

    kind: str
    length: int
    depth: float
    pair: Pair


@dataclass(frozen=True, slots=True)
class RetrievalCell:
    """Prompts of one kind, length and depth: the share found, and the answer's mean log-likelihood in nats."""

    kind: str
    length: int
    depth: float
    n: int
    original: float
    compressed: float
    original_logprob: float
    compressed_logprob: float


@dataclass(frozen=True, slots=True)
class Retrieval:
    """All cells, and per kind the paired test over all prompts: of the share found and of the log-likelihood."""

    cells: tuple[RetrievalCell, ...]
    found: dict[str, Paired]
    logprob: dict[str, Paired]
    keep: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    n_prompts: int = 10,
    n_keys: int = 4,
    seed: int = 0,
    original: Any | None = None,
    batch_size: int = 8,
    answers: Path | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Retrieval:
    """Return how often keys hidden in a text are found, by length and depth, by an attached model and its original.

    n_prompts: of each kind at each length and depth. n_keys: keys in a multikey prompt. text: any text source.
    original: for a folded model. Raises OptionError for a length beyond the model's context or a depth outside
    0..1, CalibrationError if the text is too short.
    """
    sides = both_sides(model, original=original, sinks=sinks, recent=recent)
    for length in lengths:
        check_length(sides[1], length)
    prompts = make_prompts(tokenizer, text, lengths, depths, n_prompts=n_prompts, n_keys=n_keys, seed=seed)
    pairs = [prompt.pair for prompt in prompts]
    scores: dict[str, list[Score]] = {}
    with Answers(answers) as known:
        for side in sides:
            report = None if progress is None else partial(progress, side.name)
            scores[side.name] = known.scores(side, pairs, batch_size=batch_size, progress=report)
    protocol = {
        "text": text if ":" in text else Path(text).name,
        "prompts_sha256": hashlib.sha256("".join(request_key(pair) for pair in pairs).encode()).hexdigest(),
        "lengths": list(lengths),
        "depths": list(depths),
        "n_prompts": n_prompts,
        "n_keys": n_keys,
        "seed": seed,
        "sinks": sides[1].sinks,
        "recent": sides[1].recent,
        "dtype": dtype_name(model),
    }
    found, logprob = _paired(prompts, scores)
    return Retrieval(_cells(prompts, scores), found, logprob, attachment_of(model).plan.keep, protocol)


def make_prompts(
    tokenizer: Any,
    text: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    n_prompts: int = 10,
    n_keys: int = 4,
    seed: int = 0,
) -> list[Prompt]:
    """Return seeded prompts over a text; context and answer together are `length` tokens, to the token."""
    _check(lengths, depths, n_prompts, n_keys)
    book = _book_tokens(tokenizer, text, max(lengths))
    prompts = []
    for kind in ("passkey", "multikey"):
        for length in lengths:
            for depth in depths:
                for k in range(n_prompts):
                    rng = random.Random(f"{seed} {kind} {length} {depth} {k}")
                    n = 1 if kind == "passkey" else n_keys
                    prompts.append(Prompt(kind, length, depth, _pair(tokenizer, book, rng, length, depth, n)))
    return prompts


def _check(lengths: Sequence[int], depths: Sequence[float], n_prompts: int, n_keys: int) -> None:
    if not lengths or min(lengths) < 256:
        raise OptionError("lengths must be 256 tokens or more: a prompt needs room for its keys and its question.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise OptionError("depths must lie between 0 (the key comes first) and 1 (it comes last).")
    if n_prompts < 1 or not 2 <= n_keys <= len(_NAMES):
        raise OptionError(f"a cell needs at least one prompt, and a multikey prompt 2 to {len(_NAMES)} keys.")


def _book_tokens(tokenizer: Any, text: str, n_wanted: int) -> list[int]:
    """Return the ids of the text's beginning, enough that prompts can start at different places."""
    ids: list[int] = []
    wanted = 8 * n_wanted
    for document in islice(documents(text, tokenizer), 10000):
        part = document[: wanted * _CHARS_PER_TOKEN]
        ids.extend(tokenizer(part + "\n\n", add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= wanted:
            break
    if len(ids) < n_wanted:
        raise CalibrationError(f"too little text: {text} has {len(ids)} tokens, a prompt needs {n_wanted}.")
    return ids


def _pair(tokenizer: Any, book: list[int], rng: random.Random, length: int, depth: float, n_keys: int) -> Pair:
    """Return one prompt: the asked key at `depth`, the others evenly spread over the rest."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    names = rng.sample(_NAMES, n_keys)
    keys = [str(rng.randrange(10000, 100000)) for _ in names]
    subject = ["" if n_keys == 1 else f" of {name}" for name in names]
    facts = [
        f"The pass key{s} is {k}. Remember it: {k} is the pass key{s}." for s, k in zip(subject, keys, strict=True)
    ]
    needles = [ids(f"\n{fact}\n") for fact in facts]
    head = start_tokens(tokenizer) + ids(_INTRO)
    question = f"\n\nQuestion: What is the pass key{subject[0]}?\nAnswer: The pass key{subject[0]} is"
    tail, answer = ids(question), ids(f" {keys[0]}")
    n_filler = length - len(head) - len(tail) - len(answer) - sum(len(needle) for needle in needles)
    if n_filler < 0:
        raise OptionError(f"a prompt with {n_keys} keys does not fit into {length} tokens. Choose longer --lengths.")
    start = rng.randrange(len(book) - n_filler + 1)
    filler = book[start : start + n_filler]
    places = [depth, *((i + rng.random()) / (n_keys - 1) for i in range(n_keys - 1))]
    context, previous = list(head), 0
    hidden = zip((round(place * n_filler) for place in places), needles, strict=True)
    for place, needle in sorted(hidden, key=lambda item: item[0]):
        context += filler[previous:place] + needle
        previous = place
    return Pair(tuple(context + filler[previous:] + tail), tuple(answer))


def _cells(prompts: Sequence[Prompt], scores: dict[str, list[Score]]) -> tuple[RetrievalCell, ...]:
    groups: dict[tuple[str, int, float], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault((prompt.kind, prompt.length, prompt.depth), []).append(i)
    cells = []
    for (kind, length, depth), rows in groups.items():
        found = [sum(scores[side][i].is_greedy for i in rows) / len(rows) for side in ("original", "compressed")]
        logprob = [sum(scores[side][i].logprob for i in rows) / len(rows) for side in ("original", "compressed")]
        cells.append(RetrievalCell(kind, length, depth, len(rows), *found, *logprob))
    return tuple(cells)


def _paired(prompts: Sequence[Prompt], scores: dict[str, list[Score]]) -> tuple[dict[str, Paired], dict[str, Paired]]:
    found, logprob = {}, {}
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        rows = [i for i, prompt in enumerate(prompts) if prompt.kind == kind]
        sides = [[scores[name][i] for i in rows] for name in ("original", "compressed")]
        found[kind] = compare_paired(*([float(s.is_greedy) for s in side] for side in sides))
        logprob[kind] = compare_paired(*([s.logprob for s in side] for side in sides))
    return found, logprob
