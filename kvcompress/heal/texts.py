"""Text sources -> windows to train on, and windows of every source that are kept out of the training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.calibration.text import SELF, documents
from kvcompress.checkpoint.tokenizer import windows_of
from kvcompress.errors import CalibrationError

#: Characters read per token wanted; more than any text's tokens take.
_CHARS_PER_TOKEN = 8
#: Windows from one held-out window to the next, where a source has as many: a later training on more of the same text
#: then keeps the same ones out.
_SPACING = 61
#: How often a source is passed over, at most, so that a short one has its share beside a long one.
_MOST_PASSES = 4
#: Tokens that a model samples from itself, at most: sampling one takes a GPU about as long as training on it.
_MOST_SAMPLED = 8_388_608


class HealTexts(NamedTuple):
    """training: [n_windows, seq_len]; held_out: {source: [n, seq_len]}; sha256: of all ids, which names the text."""

    training: Tensor
    held_out: dict[str, Tensor]
    sha256: str


def heal_texts(
    tokenizer: Any,
    sources: tuple[str, ...],
    *,
    tokens: int,
    seq_len: int,
    held_out: int,
    sample: Callable[[int], Tensor] | None = None,
) -> HealTexts:
    """Return windows of several sources, in equal shares as far as four passes over their text reach.

    Each source's held-out windows lie apart, from its beginning on. Together the sources may have fewer
    than `tokens` tokens even so: then the training passes over all of them again. sample(n): n windows that the
    uncompressed model samples from itself, for the source `self`. Raises CalibrationError for a source that has no
    more text than its held-out windows.
    """
    wanted = -(-tokens // seq_len)
    found = {}
    for source in sources:
        if source == SELF and sample is not None:
            most = max(held_out + 1, _MOST_SAMPLED // seq_len)
            found[source] = sample(min(-(-wanted // len(sources)) + held_out, most))
        else:
            found[source] = _windows(tokenizer, source, wanted + held_out, seq_len)
    training, kept = {}, {}
    for source, windows in found.items():
        out = _kept_out(source, windows, held_out)
        training[source], kept[source] = windows[~out], windows[out]
    shares = _shares([_MOST_PASSES * len(w) for w in training.values()], wanted)
    ids = torch.cat([_repeated(w, n) for w, n in zip(training.values(), shares, strict=True)])
    digest = hashlib.sha256(ids.numpy().tobytes())
    for windows in kept.values():
        digest.update(windows.numpy().tobytes())
    return HealTexts(ids, kept, digest.hexdigest())


def _kept_out(source: str, windows: Tensor, n: int) -> Tensor:
    """Return which windows are kept out of the training, n of them: bool [n_windows]."""
    if len(windows) <= n:
        raise CalibrationError(
            f"too little text: {source} has {len(windows)} windows of {windows.shape[1]} tokens, {n} of them are kept "
            "out of the training. Give more text, or lower --held-out or --seq-len."
        )
    spacing = min(_SPACING, len(windows) // n)
    out = torch.zeros(len(windows), dtype=torch.bool)
    out[torch.arange(n) * spacing + spacing // 2] = True
    return out


def _windows(tokenizer: Any, source: str, n_windows: int, seq_len: int) -> Tensor:
    """Return up to n_windows windows from the start of a source, documents joined by the end token."""
    left, ids = n_windows * seq_len * _CHARS_PER_TOKEN, []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in documents(source, tokenizer, n_chars=left):
        ids.extend(tokenizer(text[:left], add_special_tokens=False, verbose=False)["input_ids"] + separator)
        left -= len(text)
        if left <= 0 or len(ids) >= n_windows * seq_len:
            break
    return windows_of(tokenizer, ids, seq_len, n_windows)


def _repeated(windows: Tensor, n: int) -> Tensor:
    """Return n windows: all of them as often as they fit, and the rest evenly spread over them."""
    passes, rest = divmod(n, len(windows))
    return torch.cat([windows] * passes + [windows[torch.linspace(0, len(windows) - 1, rest).round().long()]])


def _shares(available: list[int], wanted: int) -> list[int]:
    """Return how many windows each source gives: equal shares, and what one lacks the others give."""
    shares = [0] * len(available)
    while (left := wanted - sum(shares)) > 0:
        open_ = [i for i, n in enumerate(available) if shares[i] < n]
        if not open_:
            break
        for k, i in enumerate(open_):
            fair = left // len(open_) + (k < left % len(open_))
            shares[i] = min(available[i], shares[i] + fair)
    return shares
