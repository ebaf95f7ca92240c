"""Several texts mixed: how many windows of each, and those of each kind that are held out to measure on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.builtin import BUNDLED
from kvcompress.calibration.text import CODE, PROSE, SELF, all_windows, spread, token_windows
from kvcompress.errors import CalibrationError

#: With no text given: what was best on four kinds of text (docs/measurements.md).
DEFAULT_CALIBRATION = (*BUNDLED, PROSE, CODE, SELF)
#: Of the default, at most this share is sampled from the model: sampling is slow, a token of all rows at a time.
_SAMPLED_SHARE = 8
#: Windows of a bundled text that no calibration takes, so that something is left to measure on.
_HELD_OUT = 1


@dataclass(frozen=True, slots=True)
class Mixture:
    """Windows of calibration text: ids [n_windows, seq_len], the kinds interleaved; how many of each source; sha256."""

    ids: Tensor
    shares: dict[str, int]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the ids, which names the text in reports."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def window_shares(tokenizer: Any, sources: tuple[str, ...], n_tokens: int, seq_len: int) -> dict[str, int]:
    """Return how many windows of seq_len come from each source: equal parts, at least one window in all.

    A bundled text gives what it has, and of the default an eighth is sampled; the others make up for it. No source of
    sources () is the default. Raises CalibrationError where bundled texts alone have too little.
    """
    n_windows = max(1, n_tokens // seq_len)
    named = tuple(dict.fromkeys(sources)) or DEFAULT_CALIBRATION
    limits = [n_windows] * len(named)
    for i, source in enumerate(named):
        if source in BUNDLED:
            limits[i] = max(0, len(all_windows(tokenizer, source, n_windows, seq_len)) - _HELD_OUT)
        elif source == SELF and not sources:
            limits[i] = n_windows // _SAMPLED_SHARE
    if sum(limits) < n_windows:
        raise CalibrationError(
            f"too little text: {', '.join(named)} has {sum(limits)} windows of {seq_len} tokens to calibrate on, "
            f"{n_windows} are needed. Add a text of your own with --calibration, or lower --tokens or --seq-len."
        )
    return dict(zip(named, fair_shares(n_windows, limits), strict=True))


def fair_shares(n: int, limits: Sequence[int]) -> list[int]:
    """Return n shared out one by one among those that have not reached their limit, in their order."""
    shares = [0] * len(limits)
    while sum(shares) < n:
        for i in range(len(limits)):
            if sum(shares) < n and shares[i] < limits[i]:
                shares[i] += 1
    return shares


def mixed_windows(
    tokenizer: Any, shares: dict[str, int], seq_len: int, *, sampled: Callable[[int], Tensor] | None = None
) -> Mixture:
    """Return the windows of all sources, interleaved; `sampled` gives those of the source `self`, when all are read."""
    found = {
        source: token_windows(tokenizer, source, share, seq_len)
        for source, share in shares.items()
        if share and (source != SELF or sampled is None)
    }
    if sampled is not None and (share := shares.get(SELF)):
        found[SELF] = sampled(share)
    parts = [found[source] for source in shares if source in found]
    order = sorted((i / len(p), k, i) for k, p in enumerate(parts) for i in range(len(p)))
    return Mixture(torch.stack([parts[k][i] for _, k, i in order]), shares)


def held_out_windows(tokenizer: Any, source: str, share: int, n_windows: int, seq_len: int) -> Tensor:
    """Return up to n_windows windows [n, seq_len] of a source that `mixed_windows` did not take of it, evenly spread.

    share: how many it took. Where it took all there are, none are returned. `self` has none here: it is sampled.
    """
    windows = all_windows(tokenizer, source, share + n_windows, seq_len)
    taken = all_windows(tokenizer, source, share, seq_len) if share else windows[:0]
    chosen = set(spread(len(taken), share).tolist()) if share else set()
    left = torch.tensor([i for i in range(len(windows)) if i not in chosen], dtype=torch.long)
    return windows[left[spread(len(left), min(n_windows, len(left)))]]
