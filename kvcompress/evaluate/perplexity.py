"""Perplexity, KL divergence and top-1 agreement of a compressed cache against the original, on given text.

Decode-faithful: every token attends to the compressed form of all tokens older than the window, as in
generation, but computed in parallel. Both models run on the same windows in one pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.text import documents
from kvcompress.errors import CalibrationError, OptionError
from kvcompress.runtime.attach import attachment_of

_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens; KL(original || compressed) in nats; `protocol` says how it was measured."""

    perplexity: dict[str, float]
    kl_nats: float
    top1_agreement: float
    keep: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    original: Any | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return how an attached model compares with itself uncompressed on a text source (file, JSONL, directory, id).

    The text is cut into windows of seq_len tokens from its start; each window stands alone. sinks and recent are
    the plan's by default. original: the uncompressed model, needed for a folded one only, which cannot stand for
    it and has neither sinks nor window. Raises CalibrationError if the text has less than one window.
    """
    attachment = attachment_of(model)
    plan = attachment.plan
    if plan.form == "folded":
        if original is None:
            raise OptionError("a folded model is compared with its original: name that with --base.")
        sinks = recent = 0
    sinks = plan.sinks if sinks is None else sinks
    recent = plan.recent if recent is None else recent
    reference = model if original is None else original
    windows, digest = evaluation_windows(tokenizer, text, seq_len, max_windows)
    device = next(model.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64)
    n_predicted = 0
    for i, ids in enumerate(windows):
        ids = ids[None].to(device)
        with torch.no_grad():
            exact = reference.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            with attachment.simulated(sinks=sinks, recent=recent):
                coded = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            sums += _compare(model, exact, coded, ids)
        n_predicted += ids.shape[1] - 1
        if progress:
            progress(i + 1, len(windows))
    nll, coded_nll, kl, agree = (sums / n_predicted).tolist()
    perplexity = {"original": _exp(nll), "compressed": _exp(coded_nll), "ratio": _exp(coded_nll - nll)}
    protocol = {
        "text": text if ":" in text else Path(text).name,
        "text_sha256": digest,
        "seq_len": seq_len,
        "windows": len(windows),
        "sinks": sinks,
        "recent": recent,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    return Evaluation(perplexity, kl, agree, plan.keep, protocol)


def evaluation_windows(tokenizer: Any, text: str, seq_len: int, max_windows: int | None) -> tuple[Tensor, str]:
    """Return (the first max_windows windows [n, seq_len] of a text, SHA-256 of the text)."""
    ids: list[int] = []
    digest = hashlib.sha256()
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for k, document in enumerate(documents(text)):
        digest.update(document.encode())
        ids.extend((separator if k else []) + tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if max_windows and len(ids) >= max_windows * seq_len:
            break
    n_windows = min(len(ids) // seq_len, max_windows or len(ids))
    if n_windows < 1:
        raise CalibrationError(
            f"too little text: {text} has {len(ids)} tokens, a window needs {seq_len}. "
            "Lower --seq-len or give more text."
        )
    return torch.tensor(ids[: n_windows * seq_len]).reshape(n_windows, seq_len), digest.hexdigest()


def _compare(model: Any, original: Tensor, compressed: Tensor, ids: Tensor) -> Tensor:
    """Return sums over predicted tokens of (nll original, nll compressed, KL, top-1 agreement), float64."""
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in _row_slices(ids.shape[1] - 1):
        labels = ids[:, rows.start + 1 : rows.stop + 1, None]
        p = model.lm_head(original[:, rows]).float().log_softmax(-1)
        q = model.lm_head(compressed[:, rows]).float().log_softmax(-1)
        sums += torch.stack(
            [
                -p.gather(-1, labels).sum().double(),
                -q.gather(-1, labels).sum().double(),
                (p.exp() * (p - q)).sum().double(),
                (p.argmax(-1) == q.argmax(-1)).sum().double(),
            ]
        ).cpu()
    return sums


def _row_slices(n: int) -> Iterator[slice]:
    for start in range(0, n, _LOGIT_ROWS):
        yield slice(start, min(start + _LOGIT_ROWS, n))


def _exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())
