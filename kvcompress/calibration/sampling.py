"""Text that the model samples from itself, for calibration without any text at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.taps import unplanned_attention
from kvcompress.compat import cache_argument, cache_of

#: Sequences sampled side by side by default; the cache of one batch is what bounds it.
_BATCH = 64
#: Tokens of a sampled sequence. A step takes about as long for one as for all of a batch, so that many short sequences
#: are far cheaper than a few long ones; several make a window.
_ROW = 256


def sample_windows(
    model: Any,
    tokenizer: Any,
    n_windows: int,
    seq_len: int,
    *,
    seed: int,
    batch: int = _BATCH,
    anywhere: bool = False,
    progress: Any | None = None,
) -> Tensor:
    """Return [n_windows, seq_len] ids sampled at temperature 1, seeded: sequences of up to 256 tokens side by side.

    Each begins with the start token; one that ends starts again behind its end token, as in a stream of documents.
    anywhere: every second one begins with any token of the vocabulary instead (as all do in LLM-QAT, arXiv
    2305.17888), so that a model tuned to chat speaks of other things, too.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        start = 0
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    length = min(_ROW, seq_len)
    n_rows = -(-n_windows * seq_len // length)
    batches = []
    for first in range(0, n_rows, batch):
        n = min(batch, n_rows - first)

        def sampled(n_steps: int, first: int = first, n: int = n) -> None:
            if progress:
                progress(min((first * length) + n_steps * n, n_windows * seq_len), n_windows * seq_len)

        first_ids = torch.full((n, 1), start, device=generator.device)
        if anywhere:
            drawn = torch.randint(len(tokenizer), (n // 2, 1), generator=generator, device=generator.device)
            first_ids[1::2] = drawn
        batches.append(_sampled_rows(model, first_ids, length, generator, sampled))
    return torch.cat(batches).flatten()[: n_windows * seq_len].reshape(n_windows, seq_len)


def _sampled_rows(
    model: Any, ids: Tensor, length: int, generator: torch.Generator, sampled: Callable[[int], None]
) -> Tensor:
    """Return sequences [n, length] that begin with ids [n, 1]; sampled(tokens of each so far) follows every step."""
    rows = [ids]
    cache = None
    with torch.no_grad(), unplanned_attention():
        for _ in range(length - 1):
            output = model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
            cache = cache_of(output)
            ids = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            rows.append(ids)
            sampled(len(rows))
    return torch.cat(rows, 1).cpu()
