"""One cache of vLLM timed in a process of its own: python -m kvcompress.vllm.measure SETTINGS.json RESULT.json.

vLLM gives memory back only by ending, so `kvcompress bench --engine vllm` starts one process for each cache.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

#: Begins a line that says a measurement, which kvcompress.bench.engine shows as it comes.
MEASURED = "measured "
#: Steps before the timed ones, and timed ones; no prompt ends within them.
WARM_UP, TIMED = 8, 32


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences of `context` tokens, `batch` of them; None: as many as fit."""

    batch: int | None
    context: int


class Engine:
    """vLLM in this process, fed with random tokens."""

    def __init__(self, model: str, arguments: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        self.llm = LLM(model=model, skip_tokenizer_init=True, **arguments)
        self.engine = self.llm.llm_engine
        self._number = 0
        self._generator = torch.Generator().manual_seed(0)

    @property
    def tokens_that_fit(self) -> int:
        """As vLLM's log says."""
        return int(self.engine.vllm_config.cache_config.kv_cache_size_tokens or 0)

    @property
    def vocabulary(self) -> int:
        return int(self.engine.vllm_config.model_config.get_vocab_size())

    def most_sequences(self, context: int) -> int:
        """Return how many sequences of so many tokens fit, and may run at once."""
        return max(1, min(self.tokens_that_fit // context, self.engine.vllm_config.scheduler_config.max_num_seqs))

    def prompt(self, n_tokens: int) -> list[int]:
        return torch.randint(3, self.vocabulary, (n_tokens,), generator=self._generator).tolist()

    def add(self, ids: list[int], n_new: int) -> str:
        from vllm import SamplingParams

        self._number += 1
        sampling = SamplingParams(max_tokens=n_new, temperature=0.0, ignore_eos=True, detokenize=False)
        self.engine.add_request(str(self._number), {"prompt_token_ids": ids}, sampling)
        return str(self._number)

    def first_token_seconds(self, ids: list[int]) -> float:
        """Return the time from a request's arrival to its first token."""
        start = time.perf_counter()
        self.add(ids, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def step_seconds(self, batch: int, context: int) -> tuple[float, int]:
        """Return the time of a step that gives each of `batch` sequences a token, and how many ran at once.

        Their prompts are not really read: the model is skipped until all have been, and their pages hold anything.
        Raises ValueError for sequences that would end before they are timed.
        """
        # The first sequences give tokens while the others' prompts are read; none may end before the timed steps do.
        budget = self.engine.vllm_config.scheduler_config.max_num_batched_tokens
        n_new = WARM_UP + TIMED + batch + -(-batch * context // budget)
        if n_new >= context:
            raise ValueError(
                f"{batch} sequences of {context} tokens are too short to be timed: each writes {n_new} meanwhile. "
                "Ask for longer contexts."
            )
        names = [self.add(self.prompt(context - n_new), n_new) for _ in range(batch)]
        begun: set[str] = set()
        with self._model_skipped():
            while len(begun) < batch:
                before = len(begun)
                begun |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
                if len(begun) == before and not self._prompts_left():
                    break  # the rest waits for memory
        for _ in range(WARM_UP):
            self.engine.step()
        self._wait()
        start = time.perf_counter()
        given = sum(len(self.engine.step()) for _ in range(TIMED))
        self._wait()
        seconds = time.perf_counter() - start
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return seconds / TIMED, given // TIMED

    def _prompts_left(self) -> bool:
        scheduler = self.engine.engine_core.engine_core.scheduler
        return any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.running)

    @contextmanager
    def _model_skipped(self) -> Iterator[None]:
        runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        model, runner.model = runner.model, _Skipped(runner.model)
        try:
            yield
        finally:
            runner.model = model

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class _Skipped:
    """A model whose forward gives zeros at once; everything else is the model's own."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = kwargs.get("input_ids", args[0] if args else None)
        weight = next(self._model.parameters())
        width = self._model.config.hidden_size
        return torch.zeros(len(ids), width, dtype=weight.dtype, device=weight.device)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def measure(settings: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure tokens that fit, steps, and times to a first token; each time that more is known, all go to `keep`.

    settings: model (a directory), arguments (of LLM), workloads (pairs of batch or null, and context), prompt and
    continuation (tokens, 0: not timed).
    """
    start = time.perf_counter()
    engine = Engine(settings["model"], settings["arguments"])
    found: dict[str, Any] = {"tokens_that_fit": engine.tokens_that_fit, "device": _device(), "steps": []}
    found["start_seconds"] = time.perf_counter() - start
    _say({name: found[name] for name in ("tokens_that_fit", "start_seconds")})
    keep(found)
    prompt, continuation = settings["prompt"], settings["continuation"]
    if prompt:
        found["warm_up_seconds"] = engine.first_token_seconds(engine.prompt(prompt))
        _say({"warm_up_seconds": found["warm_up_seconds"]})
        ids = engine.prompt(prompt)
        found["first_token_seconds"] = engine.first_token_seconds(ids)
        _say({"first_token_seconds": found["first_token_seconds"]})
        if continuation:
            engine.first_token_seconds(ids + engine.prompt(continuation))
            found["continued_seconds"] = engine.first_token_seconds(ids + engine.prompt(continuation))
            _say({"continued_seconds": found["continued_seconds"]})
        keep(found)
    for workload in (Workload(*w) for w in settings["workloads"]):
        batch = workload.batch or engine.most_sequences(workload.context)
        seconds, running = engine.step_seconds(batch, workload.context)
        found["steps"].append(
            {
                "batch": running,
                "most": workload.batch is None,
                "context": workload.context,
                "milliseconds": 1e3 * seconds,
                "tokens_per_second": running / seconds,
            }
        )
        _say(found["steps"][-1])
        keep(found)


def _say(found: dict[str, Any]) -> None:
    sys.stderr.write(f"{MEASURED}{json.dumps(found)}\n")
    sys.stderr.flush()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def end_with_parent() -> None:
    """End this process and all that it started as soon as its input ends, where it leads a session of its own.

    Whoever started it so holds the other end: killed, it could not end an engine that holds a GPU's memory.
    """
    if os.getsid(0) != os.getpid():
        return

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, which no thread may hold when Python ends
            pass
        os.killpg(0, signal.SIGKILL)

    Thread(target=watch, daemon=True).start()


def main() -> None:
    end_with_parent()
    settings, result = Path(sys.argv[1]), Path(sys.argv[2])

    def keep(found: dict[str, Any]) -> None:
        result.write_text(json.dumps(found), encoding="utf-8")

    measure(json.loads(settings.read_text(encoding="utf-8")), keep)


if __name__ == "__main__":
    main()
