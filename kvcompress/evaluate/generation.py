"""Does the compressed model write what the original writes? Greedy continuations, with the real compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.compat import cache_argument
from kvcompress.errors import OptionError
from kvcompress.evaluate.scoring import label_logprobs
from kvcompress.evaluate.sides import Side, both_sides, check_length, dtype_name
from kvcompress.evaluate.windows import evaluation_windows
from kvcompress.runtime.attach import attachment_of


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two greedy continuations of the same prompts compare; means over prompts, lengths in tokens.

    common_prefix: tokens until the first difference. prefixes: those of each prompt. identical: the share of prompts
    continued alike to the end. same_place: the share of places with the same token, first differences included.
    next_token: the share of the original's tokens that the compressed model would have written next, given the
    original's text so far (decode-faithful, in parallel).
    """

    common_prefix: float
    median_prefix: float
    prefixes: tuple[int, ...]
    identical: float
    same_place: float
    next_token: float
    keep: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_generation(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    n_prompts: int = 8,
    batch_size: int = 8,
    original: Any | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Agreement:
    """Return how the greedy continuations of an attached model agree with the original's.

    Prompts are windows of the text from its start. Sinks and window are the plan's, since the cache is the real one.
    End tokens do not end a continuation, so that all have new_tokens tokens. original: for a folded model.
    Raises CalibrationError if the text is too short, OptionError for sizes beyond the model's context.
    """
    sides = both_sides(model, original=original)
    if new_tokens < 1 or prompt_tokens < 1 or n_prompts < 1:
        raise OptionError("prompts, their tokens and the new tokens must be 1 or more.")
    check_length(sides[1], prompt_tokens + new_tokens)
    prompts, digest = evaluation_windows(tokenizer, text, prompt_tokens, n_prompts)
    exact, coded, followed = [], [], []
    for batch in prompts.split(batch_size):
        texts = [continue_greedily(side, batch, new_tokens) for side in sides]
        exact.append(texts[0])
        coded.append(texts[1])
        followed.append(_follows(sides[1], batch, texts[0]))
        if progress:
            progress(sum(len(part) for part in exact), len(prompts))
    same = torch.cat(exact) == torch.cat(coded)
    prefixes = same.long().cumprod(1).sum(1)
    protocol = {
        "text": text if ":" in text else Path(text).name,
        "text_sha256": digest,
        "prompts": len(prompts),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "sinks": sides[1].sinks,
        "recent": sides[1].recent,
        "dtype": dtype_name(model),
    }
    return Agreement(
        common_prefix=float(prefixes.double().mean()),
        median_prefix=float(prefixes.double().quantile(0.5)),
        prefixes=tuple(prefixes.tolist()),
        identical=float((prefixes == new_tokens).double().mean()),
        same_place=float(same.double().mean()),
        next_token=float(torch.cat(followed).double().mean()),
        keep=attachment_of(model).plan.keep,
        protocol=protocol,
    )


def continue_greedily(side: Side, prompts: Tensor, new_tokens: int) -> Tensor:
    """Return the most likely token each time, new_tokens times: prompts [batch, n] -> [batch, new_tokens], on the CPU.

    With the side's own cache; end tokens are tokens like any other.
    """
    cache = cache_argument(side.model, side.new_cache())
    ids = prompts.to(side.device)
    written = []
    with torch.no_grad(), side.reading():
        for _ in range(new_tokens):
            logits = side.model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            written.append(ids.cpu())
    return torch.cat(written, 1)


def _follows(side: Side, prompts: Tensor, written: Tensor) -> Tensor:
    """Return where the side's most likely next token is the one written: [batch, new_tokens], bool."""
    ids = torch.cat([prompts, written], 1).to(side.device)
    hidden = side.hidden_states(ids)[:, prompts.shape[1] - 1 : -1]
    _, hits = label_logprobs(side.model, hidden.flatten(0, 1), ids[:, prompts.shape[1] :].flatten())
    return hits.view(written.shape).cpu()
