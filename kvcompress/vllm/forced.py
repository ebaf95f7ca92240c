"""Given texts and greedy continuations in vLLM, in a process of its own: python -m kvcompress.vllm.forced IN.json
OUT.json.

A given text is decoded token by token: the engine is made to write it, and says how likely it found each token. It is
not read as a prompt, whose tokens would see each other exactly.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Where a request says what it must write.
_GIVEN = "kvcompress_given"


def make_processor() -> type:
    """Return the class that makes vLLM write what a request says; vLLM makes an instance of it."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class WriteGiven(AdapterLogitsProcessor):
        """Leaves a request but the token that it was given next."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            given = (params.extra_args or {}).get(_GIVEN)
            return None if given is None else lambda written, logits: _only(logits, given[len(written)])

    return WriteGiven


def forcing() -> tuple[dict[str, Any], Callable[[list[int]], dict[str, Any]]]:
    """Return what LLM needs, and what SamplingParams needs for a text, so that the engine writes the text.

    The model runner of GPUs replays traces, and takes no processor of the older interface, which that of CPUs takes.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return {"logits_processors": [make_processor()]}, lambda text: {"extra_args": {_GIVEN: text}}
    return {"enable_trace_replay": True}, lambda text: {"trace_decode_token_ids": text}


def _only(logits: Tensor, token: int) -> Tensor:
    left = torch.full_like(logits, float("-inf"))
    left[token] = 0.0
    return left


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Return {"greedy": tokens of each prompt, "texts": of each continued one, and of each given one "logprobs": of its
    tokens, and "best": whether each was the likeliest}.

    settings, all but the first two optional: model, arguments (of LLM); prompts and new_tokens; given: pairs of token
    ids, what is read as a prompt and what is written after it; continued: prompts, with stop strings and new_tokens.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    forced, written_by = forcing() if settings.get("given") else ({}, lambda text: {})
    llm = LLM(model=settings["model"], **forced, **settings["arguments"])
    common: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    found: dict[str, Any] = {"greedy": [], "texts": [], "logprobs": [], "best": []}
    if settings.get("prompts"):
        sampling = SamplingParams(max_tokens=settings["new_tokens"], detokenize=False, **common)
        outputs = llm.generate([{"prompt_token_ids": x} for x in settings["prompts"]], sampling, use_tqdm=False)
        found["greedy"] = [list(o.outputs[0].token_ids) for o in outputs]
    if settings.get("continued"):
        asked = settings["continued"]
        sampling = SamplingParams(max_tokens=asked["new_tokens"], stop=asked["stop"], temperature=0.0)
        outputs = llm.generate([{"prompt_token_ids": x} for x in asked["prompts"]], sampling, use_tqdm=False)
        found["texts"] = [o.outputs[0].text for o in outputs]
    if settings.get("given"):
        # The log-probabilities are those of the model, before anything is taken from it.
        each = [
            SamplingParams(max_tokens=len(text), logprobs=0, detokenize=False, **written_by(text), **common)
            for _, text in settings["given"]
        ]
        outputs = llm.generate([{"prompt_token_ids": x} for x, _ in settings["given"]], each, use_tqdm=False)
        for (_, text), output in zip(settings["given"], outputs, strict=True):
            written = list(output.outputs[0].token_ids)
            if written != text:
                raise RuntimeError(f"the engine wrote other tokens than it was given: {written[:8]}, {text[:8]}")
            steps = [step[token] for step, token in zip(output.outputs[0].logprobs, written, strict=True)]
            found["logprobs"].append([step.logprob for step in steps])
            found["best"].append([step.rank == 1 for step in steps])
    return found


def main() -> None:
    settings, result = Path(sys.argv[1]), Path(sys.argv[2])
    result.write_text(json.dumps(run(json.loads(settings.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
