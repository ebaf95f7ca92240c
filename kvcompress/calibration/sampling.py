"""Text that the model samples from itself, for calibration without any text at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Sequences sampled side by side; the cache of one batch is what bounds it.
_BATCH = 32


def sample_windows(
    model: Any, tokenizer: Any, n_windows: int, seq_len: int, *, seed: int, progress: Any | None = None
) -> Tensor:
    """Return [n_windows, seq_len] ids sampled at temperature 1 from the start token, seeded.

    A sequence that ends starts again behind its end token, as in a stream of documents.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        start = 0
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for first in range(0, n_windows, _BATCH):
        n = min(_BATCH, n_windows - first)
        ids = torch.full((n, 1), start, device=device)
        rows = [ids]
        cache = None
        with torch.no_grad():
            for _ in range(seq_len - 1):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                ids = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
                rows.append(ids)
                if progress:
                    progress(first * seq_len + len(rows) * n, n_windows * seq_len)
        batches.append(torch.cat(rows, 1).cpu())
    return torch.cat(batches)
