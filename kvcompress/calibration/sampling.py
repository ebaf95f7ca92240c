"""Text that the model samples from itself, for calibration without any text at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.drawing import drawn
from kvcompress.calibration.sampled_steps import FixedSteps, can_be_fixed
from kvcompress.calibration.taps import unplanned_attention
from kvcompress.compat import cache_argument, cache_of

#: Sequences sampled side by side by default; the cache of one batch is what bounds it.
_BATCH = 64
#: Tokens of a sampled sequence. A step takes about as long for one as for all of a batch, so that many short sequences
#: are far cheaper than a few long ones; several make a window.
_ROW = 256
#: Tokens after which steps at fixed addresses are held against the model: some of them were recorded by then.
_CHECKED = 6


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
    batches, sampler = [], _Sampler(model, length, generator)
    for first in range(0, n_rows, batch):
        n = min(batch, n_rows - first)

        def sampled(n_steps: int, first: int = first, n: int = n) -> None:
            if progress:
                progress(min((first * length) + n_steps * n, n_windows * seq_len), n_windows * seq_len)

        first_ids = torch.full((n, 1), start, device=generator.device)
        if anywhere:
            first_ids[1::2] = torch.randint(len(tokenizer), (n // 2, 1), generator=generator, device=generator.device)
        batches.append(sampler.rows(first_ids, sampled))
    return torch.cat(batches).flatten()[: n_windows * seq_len].reshape(n_windows, seq_len)


class _Sampler:
    """Samples batches of rows of one length from a model, by steps at fixed addresses where they can be taken."""

    def __init__(self, model: Any, length: int, generator: torch.Generator) -> None:
        self.model, self.length, self.generator = model, length, generator
        self._can_be_fixed = length > _CHECKED and can_be_fixed(model, length)
        self._fixed: dict[int, FixedSteps] = {}  # by the rows of a batch

    def rows(self, ids: Tensor, sampled: Callable[[int], None]) -> Tensor:
        """Return sequences [n, length] that begin with ids [n, 1]; sampled(tokens of each so far) follows each step."""
        before = self.generator.get_state()
        with torch.no_grad(), unplanned_attention():
            if self._can_be_fixed:
                try:
                    return self._drawn(ids, self._fixed_steps(len(ids)), sampled)
                except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
                    self._can_be_fixed = False  # a model that waits for the device, say
                    self._fixed.clear()
                    torch.cuda.synchronize(ids.device)
                    self.generator.set_state(before)
            return self._drawn(ids, _growing(self.model), sampled)

    def _fixed_steps(self, n_rows: int) -> FixedSteps:
        if n_rows not in self._fixed:
            self._fixed[n_rows] = FixedSteps(self.model, n_rows, self.length)
        self._fixed[n_rows].begin_again()
        return self._fixed[n_rows]

    def _drawn(self, ids: Tensor, step: Callable[[Tensor], Tensor], sampled: Callable[[int], None]) -> Tensor:
        rows = [ids]
        while len(rows) < self.length:
            logits = step(rows[-1])
            if isinstance(step, FixedSteps) and len(rows) == _CHECKED:
                step.check(torch.cat(rows, 1), logits)
            rows.append(drawn(logits.float().softmax(-1), self.generator))
            sampled(len(rows))
        return torch.cat(rows, 1).cpu()


def _growing(model: Any) -> Callable[[Tensor], Tensor]:
    """Return what reads a token of each row at a time, over the model's own cache: ids [n, 1] -> [n, vocabulary]."""
    cache = None

    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        output = model(input_ids=ids, use_cache=True, **cache_argument(model, cache))
        cache = cache_of(output)
        logits: Tensor = output.logits[:, -1]
        return logits

    return step
