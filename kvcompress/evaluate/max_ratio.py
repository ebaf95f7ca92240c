"""The smallest cache whose measured loss stays below a bound: `kvcompress compress --max-ratio`.

Each step plans another budget from the moments, attaches it to the one loaded model and measures it on windows that
were not calibrated on, of every kind of calibration text and of texts that are given. The bound holds for each kind, of
its windows together, with the standard error added: a few windows are lucky or unlucky by more than what is bounded.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress.calibration.builtin import BUNDLED
from kvcompress.calibration.calibrate import Progress, obtain_moments
from kvcompress.calibration.mixture import held_out_windows, window_shares
from kvcompress.calibration.moments import Moments
from kvcompress.calibration.pieces import Workers
from kvcompress.calibration.sampling import sample_windows
from kvcompress.calibration.text import SELF, check_there
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import Checkpoint, open_checkpoint
from kvcompress.checkpoint.running import is_quantised
from kvcompress.checkpoint.tokenizer import load_tokenizer
from kvcompress.checkpoint.writer import check_target
from kvcompress.errors import BudgetError, CalibrationError, OptionError
from kvcompress.evaluate.perplexity import Evaluation, Original, evaluate_attached
from kvcompress.evaluate.windows import Windows
from kvcompress.options import CompressOptions
from kvcompress.pipeline import CompressionResult, compress
from kvcompress.planning import make_plan, refit_values
from kvcompress.runtime.attach import attach_plan, detach

#: Windows of each kind that are measured: few, since every step measures all of them.
_ON_A_GPU, _ON_A_CPU = 8, 3
#: The kind that all texts that come with the package are together: of some of them calibration leaves one window.
_BUNDLED = "bundled texts"
#: The keep that is tried first; from there on the curve is followed.
_FIRST_KEEP = 0.125
_LEAST_KEEP = 0.016
#: Of a keep, so that it can be said and typed.
_DIGITS = 4
#: The search ends when the budgets known to be enough and not enough are within this factor ...
_CLOSE = 1.06
#: ... or after so many steps.
MOST_STEPS = 8
#: How log(ratio - 1) falls with log(keep), where only one point is known (docs/measurements.md: -2.3 to -4.6).
_SLOPE = -3.0
#: Losses below this are noise: a straight line through them would lead anywhere.
_LEAST_LOSS = 1e-5


@dataclass(frozen=True, slots=True)
class Step:
    """A budget that was measured: the keep asked for, the ratio on each kind of text, and its standard error."""

    keep: float
    ratios: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest ratio and error; infinite where the budget leaves no room for anything."""
        return max((ratio + self.errors.get(kind, 0.0) for kind, ratio in self.ratios.items()), default=math.inf)


@dataclass(frozen=True, slots=True)
class Search:
    """What was bounded, the steps in the order in which they were taken, and the keep that was found."""

    max_ratio: float
    keep: float
    steps: tuple[Step, ...]
    windows: int
    seq_len: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        steps = []
        for step in self.steps:
            worst = step.worst if step.ratios else None
            steps.append(asdict(step) | {"worst": worst, "enough": step.worst <= self.max_ratio})
        return asdict(self) | {"steps": steps}


def next_keep(steps: Sequence[tuple[float, float]], max_ratio: float) -> float | None:
    """Return the keep to measure next, or None when the smallest one that is enough is known closely.

    steps: (keep, ratio) of what was measured. log(ratio - 1) is nearly straight over log(keep) between neighbours: a
    secant through the two points around the bound, kept well inside them; beyond the points, a line of the usual slope.
    """
    if not steps:
        return _FIRST_KEEP
    enough = min((k for k, r in steps if r <= max_ratio), default=None)
    short = max((k for k, r in steps if r > max_ratio and (enough is None or k < enough)), default=None)
    if enough is not None and (enough <= _LEAST_KEEP or (short is not None and enough / short <= _CLOSE)):
        return None
    if short == 1 or len(steps) >= MOST_STEPS:
        return None
    loss = {keep: math.log(max(ratio - 1, _LEAST_LOSS)) for keep, ratio in steps}
    target = math.log(max(max_ratio - 1, _LEAST_LOSS))
    if enough is None or short is None:
        known = enough if short is None else short
        assert known is not None
        away = min(max(abs((target - loss[known]) / _SLOPE), math.log(1.25)), math.log(4))
        further = known * math.exp(-away if short is None else away)
        return round(min(1.0, max(_LEAST_KEEP, further)), _DIGITS)
    share = (loss[short] - target) / max(loss[short] - loss[enough], 1e-9)
    share = min(max(share, 0.15), 0.85)  # never so near one end that the other hardly moves
    return round(short * (enough / short) ** share, _DIGITS)


def compress_within(
    source: str | Path,
    output: str | Path,
    options: CompressOptions,
    max_ratio: float,
    *,
    texts: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> tuple[CompressionResult, Search]:
    """Compress with the smallest keep whose measured perplexity stays below max_ratio times the original's.

    options: as for compress(), their keep apart. texts: texts beside those of the calibration (files, JSONL, ...). The
    steps are kept in report.json (`search`). Raises a KVCompressError, also where no budget is enough.
    """
    started = time.monotonic()
    report = progress or (lambda *_: None)
    _check(options, max_ratio)
    check_target(Path(output), force=force)
    for text in texts:
        check_there(text)  # before the minutes of a calibration
    with open_checkpoint(source) as checkpoint:
        moments = obtain_moments(
            checkpoint,
            Path(output),
            options,
            device=device,
            dtype=dtype,
            resume=resume,
            workers=workers,
            progress=report,
        )
        bench = _Bench(checkpoint, moments, options, texts, (device, dtype), report)
        steps = bench.walk(max_ratio)
    found = min((s.keep for s in steps if s.worst <= max_ratio), default=None)
    if found is None:
        best = max(steps, key=lambda s: s.keep)
        raise BudgetError(
            f"no cache stays below a ratio of {max_ratio:g}: keep {best.keep:.3f} has {best.worst:.4f} on the held-out "
            "text where it is worst. Raise --max-ratio, or --recent."
        )
    search = Search(max_ratio, found, tuple(steps), bench.n_windows, options.seq_len, time.monotonic() - started)
    result = compress(
        source,
        output,
        replace(options, keep=found),
        device=device,
        dtype=dtype,
        resume=True,  # the moments are there
        force=force,
        progress=progress,
        told={"search": search.to_json()},
    )
    return replace(result, seconds=time.monotonic() - started), search


def _check(options: CompressOptions, max_ratio: float) -> None:
    if not 1 < max_ratio < 100:
        raise OptionError(
            f"--max-ratio must be above 1 and below 100 (1.005: perplexity may rise by 0.5%), found {max_ratio:g}."
        )
    if options.folded:
        raise OptionError("--max-ratio measures the coded form. Leave out --folded, or choose its --keep.")


class _Bench:
    """One loaded model and its held-out windows, on which budgets are measured one after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        moments: Moments,
        options: CompressOptions,
        texts: Sequence[str],
        arithmetic: tuple[str, str],
        report: Progress,
    ) -> None:
        self.checkpoint, self.moments, self.options, self.report = checkpoint, moments, options, report
        device, dtype = arithmetic
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" and not is_quantised(checkpoint.config) else checkpoint.spec.dtype
        tokenizer = load_tokenizer(checkpoint.path)
        self.model: Any = load_weights(checkpoint.path, dtype=dtype, device=device)
        self.n_windows = _ON_A_CPU if device == "cpu" else _ON_A_GPU
        kinds = self._windows(tokenizer, texts)
        self.originals = {kind: Original(self.model, windows, remember=True) for kind, windows in kinds.items()}

    def walk(self, max_ratio: float) -> list[Step]:
        """Return the steps taken until the smallest keep that is enough is known closely."""
        steps: list[Step] = []
        while (keep := next_keep([(s.keep, s.worst) for s in steps], max_ratio)) is not None:
            steps.append(self._measured(keep, len(steps)))
        self.report("search", MOST_STEPS, MOST_STEPS)
        return steps

    def _measured(self, keep: float, index: int) -> Step:
        try:
            options = replace(self.options, keep=keep)
            plan, maps, _ = make_plan(self.checkpoint, self.moments, options, device=str(self.model.device))
            refit_values(lambda: self.model, plan, maps, self.moments)
        except BudgetError:
            return Step(keep, {})
        attach_plan(self.model, plan, maps)
        step = Step(keep, {})
        try:
            for done, (kind, original) in enumerate(self.originals.items()):
                n_kinds = len(self.originals)
                self.report("search", index * n_kinds + done, MOST_STEPS * n_kinds)
                result: Evaluation = evaluate_attached(self.model, original)
                step.ratios[kind] = result.perplexity["ratio"]
                step.errors[kind] = result.ratio_standard_error or 0.0
        finally:
            detach(self.model)
        return step

    def _windows(self, tokenizer: Any, texts: Sequence[str]) -> dict[str, Windows]:
        """Return the held-out windows of every kind of calibration text, and the first ones of the texts given."""
        options = self.options
        shares = window_shares(tokenizer, options.calibration, options.tokens, options.seq_len)
        if options.metric == "weights":  # nothing was calibrated on
            shares = dict.fromkeys(shares, 0)
        bundled = [source for source in shares if source in BUNDLED]
        ids: dict[str, Tensor] = {}
        for source, share in shares.items():
            if source == SELF and not share:
                continue
            unseen = self._unseen(tokenizer, source, share)
            if len(unseen):
                ids[source] = unseen
            elif options.calibration:
                raise CalibrationError(
                    f"{source} has no window of {options.seq_len} tokens left that was not calibrated on, and "
                    "--max-ratio measures on such. Lower --tokens, or give more text."
                )
        if len(bundled) > 1:
            together = [ids.pop(source) for source in bundled if source in ids]
            ids = ({_BUNDLED: torch.cat(together)} if together else {}) | ids
        found = {kind: _held_out(windows, kind) for kind, windows in ids.items()}
        for text in texts:
            found[text] = Windows.of(tokenizer, text, options.seq_len, self.n_windows)
        return found

    def _unseen(self, tokenizer: Any, source: str, share: int) -> Tensor:
        """Return windows of a source of which calibration took `share`, none of them those."""
        seq_len, seed = self.options.seq_len, self.options.seed + 1
        if source == SELF:
            return sample_windows(self.model, tokenizer, self.n_windows, seq_len, seed=seed)
        return held_out_windows(tokenizer, source, share, self.n_windows, seq_len)


def _held_out(ids: Tensor, source: str) -> Windows:
    return Windows(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())
