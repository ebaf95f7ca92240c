"""Does vLLM write what our run time in transformers writes, and find a given text as likely? `eval --engine vllm`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import cache_argument
from kvcompress.errors import OptionError
from kvcompress.evaluate.sides import Side, both_sides, dtype_name
from kvcompress.evaluate.windows import evaluation_windows
from kvcompress.model.model_spec import DTYPE_BYTES
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.attach import attachment_of

#: Prompts that the run time continues in one batch, on a CPU and on a GPU.
_AT_ONCE_CPU, _AT_ONCE = 16, 64
#: Share of the memory that must be free for the engine to start; it takes what it needs.
_FREE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """The engine against the run time over the same cache.

    same_token: the share of the engine's greedy tokens that the run time writes next, given the engine's text so far.
    same_text: the share that it writes by itself, up to the first other one of each prompt. identical: the share of
    prompts of which it writes all. perplexity: of given texts decoded token by token in the
    engine, and run_time_perplexity: what `eval` finds, with blocks of 32 tokens encoded together, as generation does.
    """

    same_token: float
    same_text: float
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
    most = max(len(prompts), len(windows))
    memory = engine_memory(attachment_of(model).plan, most * length, dtype_name(model))
    own = {"dtype": dtype_name(model), "max_model_len": length, "max_num_batched_tokens": at_once, "max_num_seqs": most}
    settings = {
        "model": str(directory),
        "arguments": own | memory | (arguments or {}),
        "prompts": prompts.tolist(),
        "new_tokens": new_tokens,
        "given": [[window[:1], window[1:]] for window in windows.tolist()],
    }
    found = run_engine(settings)
    hits = follows(side, prompts, torch.tensor(found["greedy"]))
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
        same_text=float(hits.double().cumprod(1).mean()),
        identical=float(hits.all(1).double().mean()),
        perplexity=float((-logprobs.mean()).exp()),
        run_time_perplexity=_perplexity(model, windows.to(side.device)),
        protocol=protocol,
    )


def engine_memory(plan: Plan, n_tokens: int, dtype: str) -> dict[str, Any]:
    """Return arguments of LLM for a cache that surely holds so many tokens: twice what they take uncompressed, and a
    little. Left to itself the engine takes a share of all memory, in which the model lies already."""
    n_layers = len({site.layer for site in plan.sites})
    whole = sum(site.width for site in plan.sites) * DTYPE_BYTES[dtype] * (n_layers + len(plan.own_layers)) / n_layers
    return {"kv_cache_memory_bytes": int(2 * n_tokens * whole) + (256 << 20), "gpu_memory_utilization": _FREE_SHARE}


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


def follows(side: Side, prompts: Tensor, written: Tensor, *, pieces: Sequence[int] = ()) -> Tensor:
    """Return where a side's next token is the one written, given those before: bool [prompts, new tokens].

    With the side's real cache and token by token, as in generation; some prompts at a time, as all are equally long.
    pieces: where prompts [n, tokens] are cut into several forwards, because the engine read them so.
    """
    hits, at_once = [], _AT_ONCE_CPU if side.device.type == "cpu" else _AT_ONCE
    with torch.no_grad(), side.reading():
        for ids, tokens in zip(prompts.split(at_once), written.split(at_once), strict=True):
            cache = cache_argument(side.model, side.new_cache())
            *early, read = ids.to(side.device).tensor_split(list(pieces), 1)
            for piece in early:
                side.model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache)
            best = []
            for i in range(tokens.shape[1]):
                logits = side.model(input_ids=read, use_cache=True, logits_to_keep=1, **cache).logits
                best.append(logits[:, -1].argmax(-1).cpu())
                read = tokens[:, i : i + 1].to(side.device)
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
