"""Does vLLM write what our run time in transformers writes, and find a given text as likely? `eval --engine vllm`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import cache_argument
from kvcompress.errors import OptionError
from kvcompress.evaluate.perplexity import evaluation_windows
from kvcompress.evaluate.sides import Side, both_sides, dtype_name
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.runtime.attach import attachment_of

#: Prompts that the run time continues in one batch.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """The engine against the run time over the same cache.

    same_token: the share of the engine's greedy tokens that the run time writes next, given the engine's text so far.
    identical: the share of prompts of which it writes all. perplexity: of given texts decoded token by token in the
    engine, and run_time_perplexity: what `eval` finds, with blocks of 32 tokens encoded together, as generation does.
    """

    same_token: float
    identical: float
    perplexity: float
    run_time_perplexity: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_engine(
    model: Any, tokenizer: Any, directory: Path, text: str, *, n_prompts: int = 8, prompt_tokens: int = 512,
    new_tokens: int = 128, n_windows: int = 2, seq_len: int = 512, arguments: dict[str, Any] | None = None,
) -> EngineAgreement:  # fmt: skip
    """Return how vLLM, running the output `directory`, agrees with `model`, the same one attached in transformers.

    Prompts and given windows are taken from the start of the text. arguments: more of vLLM's LLM. Raises OptionError
    where vLLM does not run it, with what it said.
    """
    _, side = both_sides(model)
    prompts, digest = evaluation_windows(tokenizer, text, prompt_tokens, n_prompts)
    windows, _ = evaluation_windows(tokenizer, text, seq_len, n_windows)
    length = max(prompt_tokens + new_tokens, seq_len) + 1
    # All prompts are read in one step: a second chunk of a prompt would see the first one packed.
    at_once = max(8192, prompts.numel() + len(windows))
    own = {"dtype": dtype_name(model), "max_model_len": length, "max_num_batched_tokens": at_once}
    settings = {
        "model": str(directory),
        "arguments": own | (arguments or {}),
        "prompts": prompts.tolist(),
        "new_tokens": new_tokens,
        "given": windows.tolist(),
    }
    found = run_engine(settings)
    hits = _follows(side, prompts, torch.tensor(found["greedy"]))
    logprobs = torch.tensor(found["logprobs"], dtype=torch.float64)
    protocol = {
        "engine": "vllm",
        "text": Path(text).name,
        "text_sha256": digest,
        "prompts": len(prompts),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "windows": len(windows),
        "seq_len": seq_len,
        "dtype": dtype_name(model),
    }
    return EngineAgreement(
        same_token=float(hits.double().mean()),
        identical=float(hits.all(1).double().mean()),
        perplexity=float((-logprobs.mean()).exp()),
        run_time_perplexity=_perplexity(model, windows.to(side.device)),
        protocol=protocol,
    )


def run_engine(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what kvcompress.vllm.forced finds, in a process of its own. Raises OptionError with what vLLM said."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / name for name in ("settings.json", "result.json")]
        files[0].write_text(json.dumps(settings), encoding="utf-8")
        command = [sys.executable, "-m", "kvcompress.vllm.forced", *map(str, files)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode or not files[1].is_file():
            lines = [line for line in finished.stderr.splitlines() if "Error" in line] or ["no message"]
            raise OptionError(f"vLLM did not run {settings['model']}: {lines[-1].strip()}")
        result: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        return result


def _follows(side: Side, prompts: Tensor, written: Tensor) -> Tensor:
    """Return where the run time's next token is the one written, given those before: bool [prompts, new tokens].

    With the real cache and token by token, as in generation, _AT_ONCE prompts at a time: all are equally long.
    """
    hits = []
    with torch.no_grad(), side.reading():
        for ids, tokens in zip(prompts.split(_AT_ONCE), written.split(_AT_ONCE), strict=True):
            cache, ids = cache_argument(side.model, side.new_cache()), ids.to(side.device)
            best = []
            for i in range(tokens.shape[1]):
                logits = side.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache).logits
                best.append(logits[:, -1].argmax(-1).cpu())
                ids = tokens[:, i : i + 1].to(side.device)
            hits.append(torch.stack(best, 1) == tokens)
    return torch.cat(hits)


def _perplexity(model: Any, windows: Tensor) -> float:
    """Return the perplexity of windows [n, seq_len], each by itself, decode-faithful with blocks of 32 tokens."""
    attachment = attachment_of(model)
    plan, total, n = attachment.plan, 0.0, 0
    with torch.no_grad(), attachment.simulated(sinks=plan.sinks, recent=plan.recent, block=BLOCK_TOKENS):
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total -= float(logits.log_softmax(-1).gather(1, window[1:, None]).double().sum())
            n += len(window) - 1
    return float(torch.tensor(total / n, dtype=torch.float64).exp())
