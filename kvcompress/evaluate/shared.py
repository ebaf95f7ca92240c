"""An evaluation shared out: windows measured by workers, each with a model of its own, and joined in their order."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvcompress.calibration.pieces import Workers
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.evaluate.perplexity import Evaluation, Measured, Original, Progress, joined, measure_attached
from kvcompress.evaluate.windows import Windows
from kvcompress.plan import Plan
from kvcompress.runtime.load import load
from kvcompress.runtime.output import original_of

#: Pieces for each worker, so that none waits long for the last one.
_PIECES = 4


def evaluate_shared(
    output: Path,
    text: str,
    workers: Workers,
    *,
    dtype: str,
    base: str | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Return what `evaluate` returns for a compressed checkpoint, its windows measured by workers.

    dtype: in which they run. output and base must be on a disk of theirs, too.
    """
    plan = Plan.load(output)
    whole = (output / "config.json").is_file()
    with ExitStack() as stack:
        path = output if whole else stack.enter_context(original_of(output, plan, base))
        windows = Windows.of(load_tokenizer(path), text, seq_len, max_windows)
    size = max(1, len(windows.ids) // (_PIECES * workers.n))
    pieces = [replace(windows, ids=ids) for ids in windows.ids.split(size)]
    found: dict[int, Measured] = {}
    for index, measured in workers.each(
        _measure, [(str(output.absolute()), base, dtype, piece, sinks, recent) for piece in pieces]
    ):
        found[index] = measured
        if progress:
            progress(sum(len(pieces[i].ids) for i in found), len(windows.ids))
    return joined([found[i] for i in range(len(pieces))], windows, plan)


_AT_HAND = ExitStack()


@lru_cache(maxsize=1)
def _models(output: str, base: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Return (compressed model, the one that it is compared with), which stay for a worker's next piece."""
    _AT_HAND.close()
    directory, plan, chosen = Path(output), Plan.load(Path(output)), getattr(torch, dtype)
    needs_original = plan.form == "folded"
    path = None
    if needs_original or not (directory / "config.json").is_file():
        path = _AT_HAND.enter_context(original_of(directory, plan, base))
    model = load(directory, base=path, dtype=chosen, device=device)
    return model, load_weights(path, dtype=chosen, device=device) if needs_original and path else model


def _measure(
    output: str, base: str | None, dtype: str, windows: Windows, sinks: int | None, recent: int | None, device: str
) -> Measured:
    model, original = _models(output, base, dtype, device)
    return measure_attached(model, Original(original, windows), sinks=sinks, recent=recent)
