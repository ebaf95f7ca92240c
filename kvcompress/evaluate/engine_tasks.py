"""What tasks ask, answered by vLLM over a compressed cache: `eval --engine vllm --tasks`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompress.errors import OptionError
from kvcompress.evaluate.engine import engine_memory, run_engine
from kvcompress.evaluate.scoring import Pair, Score
from kvcompress.evaluate.sides import both_sides, dtype_name
from kvcompress.runtime.attach import attachment_of

#: Tokens that the engine's cache holds, at the least.
_TOKENS = 65536


class EngineAnswerer:
    """An output in vLLM, which starts for each list of questions; what it runs with is that of the run time beside it.

    A context is read as a prompt, its tokens seeing each other exactly, and the continuation written token by token
    after it, as in serving. So short contexts say little about the cache: `eval --tasks` without an engine is stricter.
    """

    def __init__(self, directory: Path, *, max_tokens: int, arguments: dict[str, Any] | None = None) -> None:
        """max_tokens: the model's context, to which inputs are cut from the left; arguments: more of vLLM's LLM."""
        self.directory, self.max_tokens = directory, max_tokens
        # Without it a second question about a context would find it packed.
        self._arguments = {"enable_prefix_caching": False} | (arguments or {})

    @classmethod
    def beside(cls, model: Any, directory: Path) -> EngineAnswerer:
        """Return an answerer that runs as the attached model does, in the memory that this leaves."""
        side, dtype = both_sides(model)[1], dtype_name(model)
        memory = engine_memory(attachment_of(model).plan, max(4 * side.max_tokens, _TOKENS), dtype)
        arguments = {"dtype": dtype} | memory
        return cls(directory, max_tokens=side.max_tokens, arguments=arguments)

    def scores(self, pairs: Sequence[Pair]) -> list[Score]:
        """Return the score of each continuation. Raises OptionError where vLLM does not run, or for an empty side."""
        given = []
        for pair in pairs:
            if not pair.context or not pair.continuation:
                raise OptionError("a request has an empty context or continuation. Check the task's file.")
            if len(pair.continuation) >= self.max_tokens:
                raise OptionError(f"a continuation of {len(pair.continuation)} tokens exceeds the model's context.")
            context = pair.context[-(self.max_tokens - len(pair.continuation)) :]
            given.append([list(context), list(pair.continuation)])
        found = self._run({"given": given}, max(len(context) + len(text) for context, text in given))
        return [
            Score(sum(logprobs), all(best)) for logprobs, best in zip(found["logprobs"], found["best"], strict=True)
        ]

    def texts(self, prompts: Sequence[Sequence[int]], *, n_new: int, stop: Sequence[str]) -> list[str]:
        """Return the greedy text after each prompt of token ids, up to the first stop string."""
        asked = {"prompts": [list(x) for x in prompts], "new_tokens": n_new, "stop": list(stop)}
        found = self._run({"continued": asked}, max(map(len, prompts)) + n_new)
        return [str(text) for text in found["texts"]]

    def _run(self, asked: dict[str, Any], length: int) -> dict[str, Any]:
        # One more token, as the engine wants room for a next one; and a prompt is read in one step, never in chunks.
        own = {"max_model_len": length + 1, "max_num_batched_tokens": max(8192, length + 1)}
        return run_engine({"model": str(self.directory), "arguments": own | self._arguments} | asked)
