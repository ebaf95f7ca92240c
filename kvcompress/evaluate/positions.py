"""Perplexity by position in the context: does the loss of compression grow with distance?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.evaluate.scoring import label_logprobs
from kvcompress.evaluate.sides import Side, both_sides, check_length, dtype_name
from kvcompress.evaluate.windows import evaluation_windows
from kvcompress.runtime.attach import attachment_of


@dataclass(frozen=True, slots=True)
class PositionBin:
    """Tokens at positions start..stop-1 of their windows. ratio: compressed over original perplexity.

    ratio_stderr: from the spread over windows (None for one window).
    """

    start: int
    stop: int
    original: float
    compressed: float
    ratio: float
    ratio_stderr: float | None


@dataclass(frozen=True, slots=True)
class Positions:
    """Perplexity in quarters of the context and in bins that double, and how the ratio changes.

    last_over_first: the ratio in the last quarter divided by that in the first; 1 if the loss does not grow.
    """

    quarters: tuple[PositionBin, ...]
    doubling: tuple[PositionBin, ...]
    last_over_first: float
    last_over_first_stderr: float | None
    keep: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_positions(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    seq_len: int = 8192,
    max_windows: int | None = None,
    original: Any | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Positions:
    """Return an attached model's perplexity by position, decode-faithful, beside the original's, on a text source.

    The text is cut into windows of seq_len tokens; position 0 predicts the second token of a window. original: for
    a folded model. Raises OptionError if seq_len is beyond the model's context, CalibrationError if the text has
    less than one window.
    """
    sides = both_sides(model, original=original, sinks=sinks, recent=recent)
    check_length(sides[1], seq_len)
    windows, digest = evaluation_windows(tokenizer, text, seq_len, max_windows)
    losses: dict[str, list[Tensor]] = {"original": [], "compressed": []}
    for i, ids in enumerate(windows):
        for side in sides:
            losses[side.name].append(window_losses(side, ids))
        if progress:
            progress(i + 1, len(windows))
    exact, coded = (torch.stack(losses[side.name]) for side in sides)
    edges = [round(q * (seq_len - 1) / 4) for q in range(5)]
    quarters = _bins(exact, coded, edges)
    growth = _log_ratios(exact, coded, *edges[-2:]) - _log_ratios(exact, coded, *edges[:2])
    last_over_first = quarters[-1].ratio / quarters[0].ratio
    protocol = {
        "text": text if ":" in text else Path(text).name,
        "text_sha256": digest,
        "seq_len": seq_len,
        "windows": len(windows),
        "sinks": sides[1].sinks,
        "recent": sides[1].recent,
        "dtype": dtype_name(model),
    }
    return Positions(
        quarters=quarters,
        doubling=_bins(exact, coded, _doubling_edges(seq_len - 1)),
        last_over_first=last_over_first,
        last_over_first_stderr=_stderr(growth, last_over_first),
        keep=attachment_of(model).plan.keep,
        protocol=protocol,
    )


def window_losses(side: Side, ids: Tensor) -> Tensor:
    """Return the loss in nats of each predicted token of a window: ids [n_tokens] -> [n_tokens - 1], float64."""
    ids = ids.to(side.device)
    hidden = side.hidden_states(ids[None])[0, :-1]
    return -label_logprobs(side.model, hidden, ids[1:])[0].double().cpu()


def _doubling_edges(n: int) -> list[int]:
    """Return 0, 64, 128, 256, ... up to n; the last bin holds what is left."""
    edges = [0, 64]
    while edges[-1] * 2 < n:
        edges.append(edges[-1] * 2)
    return [*(edge for edge in edges if edge < n), n]


def _bins(exact: Tensor, coded: Tensor, edges: Sequence[int]) -> tuple[PositionBin, ...]:
    """exact, coded: losses [n_windows, n_positions]."""
    bins = []
    for start, stop in pairwise(edges):
        original, compressed = (float(x[:, start:stop].mean()) for x in (exact, coded))
        ratio = math.exp(compressed - original)
        stderr = _stderr(_log_ratios(exact, coded, start, stop), ratio)
        bins.append(PositionBin(start, stop, math.exp(original), math.exp(compressed), ratio, stderr))
    return tuple(bins)


def _log_ratios(exact: Tensor, coded: Tensor, start: int, stop: int) -> Tensor:
    """Return each window's mean loss difference over a range of positions: [n_windows], nats."""
    return (coded - exact)[:, start:stop].mean(1)


def _stderr(log_ratios: Tensor, ratio: float) -> float | None:
    """Return the standard error of exp(mean of log_ratios), to first order."""
    n = len(log_ratios)
    return ratio * float(log_ratios.std()) / math.sqrt(n) if n > 1 else None
