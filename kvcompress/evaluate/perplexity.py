"""Perplexity, KL divergence and top-1 agreement of a compressed cache against the original, on given text.

Decode-faithful: every token attends to the compressed form of all tokens older than the window, as in
generation, but computed in parallel. Both models run on the same windows; an `Original` remembers its states, so
that many compressions are compared with one run of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.distance import Distance, Seen, distance_of, watched
from kvcompress.compat import decoder_of
from kvcompress.errors import OptionError
from kvcompress.evaluate.sides import dtype_name
from kvcompress.evaluate.states import decoded_states
from kvcompress.evaluate.windows import Windows
from kvcompress.model.head import logits_of
from kvcompress.plan import Plan
from kvcompress.runtime.attach import attachment_of

_LOGIT_ROWS = 256
#: Tokens that a GPU reads at once, in windows: of fewer it waits most of the time for its kernels to be started.
_TOKENS_ON_A_GPU = 8192
Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True)
class TextDistance:
    """How far a text is from what was calibrated on (codec/distance.py), what is typical there, and the verdict."""

    component_energy: float
    gains_at_ends: float
    typical_component_energy: float
    typical_gains_at_ends: float
    is_far: bool

    @classmethod
    def of(cls, found: Distance | None, plan: Plan) -> TextDistance | None:
        """Return what is said of a text; None where it or the calibration text was not seen encoded."""
        if found is None or "typical" not in plan.calibration:
            return None
        typical = Distance(**plan.calibration["typical"])
        return cls(
            found.component_energy,
            found.gains_at_ends,
            typical.component_energy,
            typical.gains_at_ends,
            found.is_far(typical),
        )


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted tokens; KL(original || compressed) in nats; `protocol` says how it was measured.

    ratio_standard_error: of the ratio of perplexities, from its spread over the windows; None with one window.
    log_ratios: the log of each window's ratio, for paired comparisons; not part of the JSON. distance: how far the text
    is from what was calibrated on, where the cache is ours.
    """

    perplexity: dict[str, float]
    ratio_standard_error: float | None
    kl_nats: float
    top1_agreement: float
    keep: float
    protocol: dict[str, Any]
    log_ratios: tuple[float, ...] = field(repr=False)
    distance: TextDistance | None = None

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["log_ratios"]
        if self.distance is None:  # a peer, or a fold
            del document["distance"]
        return document


class Original:
    """The uncompressed model's final hidden states of every window; computed once each if `remember`.

    The model must have nothing attached, or be attached and called without simulation and cache, as here.
    """

    def __init__(self, model: Any, windows: Windows, *, remember: bool = False) -> None:
        self.model, self.windows, self.remember = model, windows, remember
        self._states: dict[int, Tensor] = {}

    def states(self, start: int, stop: int) -> Tensor:
        """Return the final hidden states of windows on the model's device: [stop - start, seq_len, d_model]."""
        device = next(self.model.parameters()).device
        if all(index in self._states for index in range(start, stop)):
            return torch.stack([self._states[index] for index in range(start, stop)]).to(device)
        with torch.no_grad():
            ids = self.windows.ids[start:stop].to(device)
            states: Tensor = decoder_of(self.model)(input_ids=ids, use_cache=False)[0]
        if self.remember:
            self._states.update(enumerate(states.cpu().unbind(), start))
        return states


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
    progress: Progress | None = None,
) -> Evaluation:
    """Return how an attached model compares with itself uncompressed on a text source (file, JSONL, directory, id).

    The text is cut into windows of seq_len tokens from its start; each window stands alone. sinks and recent are
    the plan's by default. original: the uncompressed model, needed for a folded one only, which cannot stand for
    it and has neither sinks nor window. Raises CalibrationError if the text has less than one window.
    """
    if attachment_of(model).plan.form == "folded" and original is None:
        raise OptionError("a folded model is compared with its original: name that with --base.")
    windows = Windows.of(tokenizer, text, seq_len, max_windows)
    reference = Original(model if original is None else original, windows)
    return evaluate_attached(model, reference, sinks=sinks, recent=recent, progress=progress)


def evaluate_attached(
    model: Any,
    original: Original,
    *,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Return how an attached model compares with `original`, on its windows."""
    found = measure_attached(model, original, sinks=sinks, recent=recent, progress=progress)
    return joined([found], original.windows, attachment_of(model).plan)


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums of some windows, [n_windows, 4] float64 (see _compare), and what was seen of each site.

    protocol: what must be said of them, but for the text.
    """

    sums: Tensor
    seen: tuple[Seen, ...]
    dtype: str
    protocol: dict[str, Any]


def measure_attached(
    model: Any,
    original: Original,
    *,
    sinks: int | None = None,
    recent: int | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Return the sums of an attached model on the windows of `original`; a GPU reads several at once."""
    attachment = attachment_of(model)
    plan = attachment.plan
    if plan.form == "folded":
        sinks = recent = 0
    sinks = plan.sinks if sinks is None else sinks
    recent = plan.recent if recent is None else recent

    def coded(ids: Tensor) -> Tensor:
        return decoded_states(model, attachment, ids, sinks=sinks, recent=recent)

    sites = [site for layer in attachment.codecs for site in (layer.key, layer.value)] if plan.form == "coded" else []
    with watched(sites, skipped=sinks) as watches:
        sums = _window_sums(model, original, coded, batch=_at_once(model, original.windows), progress=progress)
    protocol = {"sinks": sinks, "recent": recent}
    return Measured(sums, tuple(watch.seen for watch in watches), dtype_name(model), protocol)


def joined(parts: Sequence[Measured], windows: Windows, plan: Plan) -> Evaluation:
    """Return the evaluation of a plan on `windows`, from the sums of consecutive parts of them."""
    first = parts[0]
    sums = torch.cat([part.sums for part in parts])
    result = _evaluation(sums, windows, first.dtype, keep=plan.keep, protocol=first.protocol)
    seen = [reduce(Seen.plus, of_site) for of_site in zip(*(part.seen for part in parts), strict=True)]
    return replace(result, distance=TextDistance.of(distance_of(seen), plan))


def compare_states(
    model: Any,
    original: Original,
    coded: Callable[[Tensor], Tensor],
    *,
    keep: float,
    protocol: dict[str, Any],
    batch: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the figures of a compressed cache on the windows of `original`.

    coded: ids [n, seq_len] -> final hidden states [n, seq_len, d_model] as decoding with the cache gives them, for at
    most `batch` windows; `model` turns them into logits. keep and protocol are passed on.
    """
    sums = _window_sums(model, original, coded, batch=batch, progress=progress)
    return _evaluation(sums, original.windows, dtype_name(model), keep=keep, protocol=protocol)


def _at_once(model: Any, windows: Windows) -> int:
    on_gpu = next(model.parameters()).device.type == "cuda"
    return max(1, _TOKENS_ON_A_GPU // windows.ids.shape[1]) if on_gpu else 1


def _window_sums(
    model: Any,
    original: Original,
    coded: Callable[[Tensor], Tensor],
    *,
    batch: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Return the sums of every window, [n_windows, 4]."""
    device = next(model.parameters()).device
    n_windows = len(original.windows.ids)
    sums = torch.zeros(n_windows, 4, dtype=torch.float64)
    for start in range(0, n_windows, batch):
        ids = original.windows.ids[start : start + batch].to(device)
        stop = start + len(ids)
        with torch.no_grad():
            theirs, ours = original.states(start, stop), coded(ids)
            for i in range(len(ids)):
                one = slice(i, i + 1)
                sums[start + i] = _compare((original.model, theirs[one]), (model, ours[one]), ids[one])
        if progress:
            progress(stop, n_windows)
    return sums


def _evaluation(sums: Tensor, windows: Windows, dtype: str, *, keep: float, protocol: dict[str, Any]) -> Evaluation:
    n_windows, seq_len = windows.ids.shape
    nll, coded_nll, kl, agree = (sums.sum(0) / (n_windows * (seq_len - 1))).tolist()
    ratio = _exp(coded_nll - nll)
    log_ratios = (sums[:, 1] - sums[:, 0]) / (seq_len - 1)
    error = None
    if n_windows > 1:  # the ratio is the exponential of the mean log ratio
        error = ratio * float(log_ratios.std() / n_windows**0.5)
    return Evaluation(
        perplexity={"original": _exp(nll), "compressed": _exp(coded_nll), "ratio": ratio},
        ratio_standard_error=error,
        kl_nats=kl,
        top1_agreement=agree,
        keep=keep,
        protocol=windows.protocol(dtype) | protocol,
        log_ratios=tuple(log_ratios.tolist()),
    )


def _compare(original: tuple[Any, Tensor], compressed: tuple[Any, Tensor], ids: Tensor) -> Tensor:
    """Return sums over predicted tokens of (nll original, nll compressed, KL, top-1 agreement), float64.

    original, compressed: each a model and its final hidden states. Each has logits by its own head, which a healed
    fold may have trained.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in _row_slices(ids.shape[1] - 1):
        labels = ids[:, rows.start + 1 : rows.stop + 1, None]
        p, q = (logits_of(model, states[:, rows]).float().log_softmax(-1) for model, states in (original, compressed))
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
    return float(torch.tensor(x, dtype=torch.float64).exp())  # inf where math.exp raises
