"""Given texts and greedy continuations in vLLM, in a process of its own: python -m kvcompress.vllm.forced IN.json
OUT.json.

A given text is decoded token by token: the engine is made to write it, and says how likely it found each token. Nothing
of it is read as a prompt, whose tokens would see each other exactly.
"""

from __future__ import annotations

import json
import os
import sys
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


def _only(logits: Tensor, token: int) -> Tensor:
    left = torch.full_like(logits, float("-inf"))
    left[token] = 0.0
    return left


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Return {"greedy": tokens of each prompt, "logprobs": of each given token after the first of each text}.

    settings: model, arguments (of LLM), prompts and new_tokens, given (texts as token ids, of two tokens or more).
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(model=settings["model"], logits_processors=[make_processor()], **settings["arguments"])
    common: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    found: dict[str, Any] = {"greedy": [], "logprobs": []}
    if settings["prompts"]:
        sampling = SamplingParams(max_tokens=settings["new_tokens"], **common)
        outputs = llm.generate([{"prompt_token_ids": x} for x in settings["prompts"]], sampling, use_tqdm=False)
        found["greedy"] = [list(o.outputs[0].token_ids) for o in outputs]
    if settings["given"]:
        # The log-probabilities are those of the model, before anything is taken from it.
        each = [
            SamplingParams(max_tokens=len(x) - 1, logprobs=0, extra_args={_GIVEN: x[1:]}, **common)
            for x in settings["given"]
        ]
        outputs = llm.generate([{"prompt_token_ids": x[:1]} for x in settings["given"]], each, use_tqdm=False)
        for text, output in zip(settings["given"], outputs, strict=True):
            written = list(output.outputs[0].token_ids)
            if written != text[1:]:
                raise RuntimeError(f"the engine wrote other tokens than it was given: {written[:8]}, {text[1:9]}")
            steps = output.outputs[0].logprobs
            found["logprobs"].append([step[token].logprob for step, token in zip(steps, written, strict=True)])
    return found


def main() -> None:
    settings, result = Path(sys.argv[1]), Path(sys.argv[2])
    result.write_text(json.dumps(run(json.loads(settings.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
