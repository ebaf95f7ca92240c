"""A side of the comparison as a model of EleutherAI's lm-eval, and local files as tasks of it.

Needs lm-eval (`pip install 'kvcompress[tasks]'`); kvcompress.evaluate.tasks imports this module when it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from kvcompress.compat import cache_argument
from kvcompress.errors import OptionError
from kvcompress.evaluate.answers import Answers, text_key
from kvcompress.evaluate.engine_tasks import EngineAnswerer
from kvcompress.evaluate.scoring import Pair, compressed_share, encode_pair, encode_text, prefix_token
from kvcompress.evaluate.sides import Side
from kvcompress.evaluate.task_files import METRICS, LocalTask

#: Tokens generated where a task does not say; lm-eval's own number.
_MAX_NEW_TOKENS = 256
#: Most sequences generated together; their caches live at the same time.
_GENERATED_TOGETHER = 16
_SAMPLING_SEED = 1234  # lm-eval's default
_ALL = 1 << 30


class SideLM(LM):
    """lm-eval's model interface over one side: likelihoods decode-faithful, generation with the side's own cache."""

    def __init__(
        self,
        side: Side,
        tokenizer: Any,
        *,
        answers: Answers,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.side, self.tokenizer, self.answers = side, tokenizer, answers
        self.batch_size, self.progress = batch_size, progress
        self.pairs: dict[str, list[Pair]] = {}  # of each task, for the share that is seen compressed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        for request, pair in zip(requests, pairs, strict=True):
            self.pairs.setdefault(str(request.task_name), []).append(pair)
        return [(score.logprob, score.is_greedy) for score in self._scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of whole texts, cut into windows of the model's context that do not overlap."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = encode_text(self.tokenizer, request.args[0])
            parts = _rolling_windows(ids, prefix_token(self.tokenizer), self.side.max_tokens)
            self.pairs.setdefault(str(request.task_name), []).extend(parts)
            windows.extend(parts)
            owners.extend([i] * len(parts))
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self._scores(windows), strict=True):
            totals[i] += score.logprob
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text that follows each context, up to the first of its stop strings."""
        asked = [(str(request.args[0]), dict(request.args[1])) for request in requests]
        keys = _generation_keys(asked)
        missing = {k: request for k, request in zip(keys, asked, strict=True) if self.answers.get(self.side, k) is None}
        done = len(keys) - len(missing)
        for batch in self._generation_batches(missing):
            texts = self._generate([missing[key][0] for key in batch], dict(missing[batch[0]][1]))
            for key, text in zip(batch, texts, strict=True):
                self.answers.put(self.side, key, text)
            self.answers.flush()
            done += len(batch)
            if self.progress:
                self.progress(done, len(keys))
        return [str(self.answers.get(self.side, key)) for key in keys]

    def share_compressed(self, task: str) -> float | None:
        """Return which share of what a task's scored tokens attend to is seen compressed; None if nothing is scored."""
        return compressed_share(self.side, self.pairs[task]) if task in self.pairs else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _scores(self, pairs: list[Pair]) -> Any:
        return self.answers.scores(self.side, pairs, batch_size=self.batch_size, progress=self.progress)

    def _generation_batches(self, asked: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[list[str]]:
        """Yield keys that are generated together: the same options, similar lengths, the longest first."""
        groups: dict[str, list[str]] = {}
        for key, (_, options) in asked.items():
            groups.setdefault(repr(options), []).append(key)
        n = min(self.batch_size, _GENERATED_TOGETHER)
        for keys in groups.values():
            keys.sort(key=lambda key: -len(asked[key][0]))
            yield from (keys[i : i + n] for i in range(0, len(keys), n))

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        until, n_new, room = self._limits(options)
        if not options.get("do_sample"):
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        ids, mask = self._left_padded([encode_text(self.tokenizer, context)[-room:] for context in contexts])
        with torch.random.fork_rng(), self.side.reading():
            torch.manual_seed(_SAMPLING_SEED)
            output = self.side.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=n_new,
                pad_token_id=prefix_token(self.tokenizer),
                **cache_argument(self.side.model, self.side.new_cache()),
                **({"stop_strings": until, "tokenizer": self.tokenizer} if until else {}),
                **options,
            )
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [_cut(str(text), until) for text in texts]

    def _limits(self, options: dict[str, Any]) -> tuple[list[str], int, int]:
        """Take (stop strings, most new tokens) out of a task's options; with them, the most tokens of a prompt."""
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        n_new = int(options.pop("max_gen_toks", options.pop("max_new_tokens", _MAX_NEW_TOKENS)))
        room = self.side.max_tokens - n_new
        if room < 1:
            raise OptionError(f"a task asks for {n_new} new tokens; the model reads {self.side.max_tokens} in all.")
        return until, n_new, room

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width, pad = max(len(row) for row in rows), prefix_token(self.tokenizer)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.side.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.side.device)
        return ids, mask


class EngineLM(SideLM):
    """The compressed side as vLLM answers for it; side: which says how inputs are cut and answers are known."""

    def __init__(self, side: Side, tokenizer: Any, *, answerer: EngineAnswerer, answers: Answers) -> None:
        # An engine starts once for all questions of a kind, not for each batch.
        super().__init__(side, tokenizer, answers=answers, batch_size=_ALL)
        self._answerer = answerer

    def share_compressed(self, task: str) -> float | None:
        """Return None: what a token sees packed depends on how the engine read the prompt."""
        return None

    def _scores(self, pairs: list[Pair]) -> Any:
        return self.answers.scores(self.side, pairs, by=self._answerer.scores)

    def _generation_batches(self, asked: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[list[str]]:
        groups: dict[str, list[str]] = {}
        for key, (_, options) in asked.items():
            groups.setdefault(repr(options), []).append(key)
        yield from groups.values()

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        if options.get("do_sample"):
            raise OptionError("a task samples its answers, which --engine does not do. Leave it out, or --engine.")
        until, n_new, room = self._limits(options)
        prompts = [encode_text(self.tokenizer, context)[-room:] for context in contexts]
        return [_cut(text, until) for text in self._answerer.texts(prompts, n_new=n_new, stop=until)]


def _generation_keys(asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return what names each request; a sampled one that is asked again is another one."""
    seen: Counter[str] = Counter()
    keys = []
    for context, options in asked:
        key = text_key(context, repr(sorted(options.items(), key=str)))
        seen[key] += 1
        keys.append(f"{key}-{seen[key]}" if options.get("do_sample") and seen[key] > 1 else key)
    return keys


def _cut(text: str, until: list[str]) -> str:
    """Return the text before the first of the stop strings."""
    return min((text.split(stop, 1)[0] for stop in until), key=len, default=text)


def _rolling_windows(ids: list[int], prefix: int, max_tokens: int) -> list[Pair]:
    """Return pairs that score each token once; the last window is filled up with context, as in lm-eval."""
    pairs = []
    for start in range(0, len(ids), max_tokens):
        stop = min(start + max_tokens, len(ids))
        context = ids[stop - max_tokens - 1 : start] if start else [prefix]
        pairs.append(Pair(tuple(context), tuple(ids[start:stop])))
    return pairs


class FileTask(ConfigurableTask):
    """A local file as a task of lm-eval: scored, averaged and given a standard error like any other."""

    def __init__(self, task: LocalTask) -> None:
        self._documents = _Documents(task.documents)
        super().__init__(config={"task": task.name, "test_split": "test", "fewshot_split": "test", **_config(task)})

    def download(self, *_: Any, **__: Any) -> None:
        """Take the documents that are already there instead of the data sets of the hub."""
        self.dataset = {"test": self._documents}


class _Documents(list[dict[str, Any]]):
    """A list with the one attribute of a data set that lm-eval asks for."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


def _config(task: LocalTask) -> dict[str, Any]:
    better = {"perplexity": False, "bits_per_byte": False}
    aggregation = {"perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
    metrics = [
        {"metric": m, "aggregation": aggregation.get(m, "mean"), "higher_is_better": better.get(m, True)}
        for m in METRICS[task.format]
    ]
    fields: dict[str, dict[str, Any]] = {
        "mc": {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_target": "gold"}
        | {"doc_to_choice": "choices"},
        # an index instead of a text tells lm-eval that the choices are contexts
        "contexts": {"output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_target": "target"}
        | {"doc_to_choice": "contexts"},
        "cloze": {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"},
        "cond": {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
        | {"process_results": _bits_per_byte},
    }
    return {"metric_list": metrics, **fields[task.format]}


def _bits_per_byte(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    return {"bits_per_byte": (results[0][0], len(document["target"].encode()))}
