"""What lm-eval computed for both models, put side by side with standard errors and paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from kvcompress.evaluate.paired import Paired, compare_paired
from kvcompress.evaluate.task_files import LocalTask

#: lm-eval's metrics whose documents are (log-likelihood, length) pairs; other pairs are (right answer, given answer).
_WEIGHTED = ("bits_per_byte", "byte_perplexity", "word_perplexity")


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric of one task, as lm-eval computes it, with its standard errors and the paired difference.

    paired: None where a metric is not a number for each document. headline: the metric that counts in the average.
    """

    metric: str
    original: float
    compressed: float
    original_stderr: float | None
    compressed_stderr: float | None
    paired: Paired | None
    higher_is_better: bool
    headline: bool


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task. compressed_share: of all tokens that scored tokens attend to, the share that is seen compressed.

    It is None for a task that generates: that uses the real cache.
    """

    task: str
    n_documents: int
    n_fewshot: int
    compressed_share: float | None
    metrics: tuple[MetricResult, ...]


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """Tasks side by side. average: of the headline metrics that are accuracies, None where there are none."""

    tasks: tuple[TaskResult, ...]
    average: MetricResult | None
    keep: float
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SideRun:
    """One side's results: lm-eval's metrics, each document's values, and shares seen compressed, by task."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    higher_is_better: dict[str, dict[str, bool]]
    n_fewshot: dict[str, int]
    shares: dict[str, float | None]
    version: str


def task_result(name: str, runs: Sequence[SideRun], local: dict[str, LocalTask]) -> TaskResult:
    """Return one task of (the original's run, the compressed model's run)."""
    exact, coded = runs
    metrics = [
        key for key, value in exact.results[name].items() if "," in key and "_stderr," not in key and _is_number(value)
    ]
    headline = _headline(name, metrics, local)
    rows = []
    for key in metrics:
        metric, _, filtered = key.partition(",")
        values = [_document_values(run.samples[name], metric, filtered) for run in runs]
        figures = [float(run.results[name][key]) for run in runs]
        rows.append(
            MetricResult(
                metric if filtered == "none" else f"{metric} ({filtered})",
                figures[0],
                figures[1],
                _stderr(figures[0], values[0]),
                _stderr(figures[1], values[1]),
                compare_paired(*values) if values[0] and values[1] else None,
                bool(exact.higher_is_better.get(name, {}).get(metric, True)),
                key == headline,
            )
        )
    n_documents = len({sample["doc_id"] for sample in exact.samples[name]})
    return TaskResult(name, n_documents, int(exact.n_fewshot.get(name, 0)), coded.shares[name], tuple(rows))


def _headline(name: str, metrics: Sequence[str], local: dict[str, LocalTask]) -> str | None:
    """Return the key of the metric to judge by: the file's, or the length-normalised accuracy where there is one."""
    wanted = [local[name].headline] if name in local else ["acc_norm", "acc", "exact_match"]
    found = [key for w in wanted for key in metrics if key.partition(",")[0] == w]
    return next(iter([*found, *metrics]), None)


def _document_values(samples: Sequence[dict[str, Any]], metric: str, filtered: str) -> list[float]:
    """Return the metric of each document, or nothing where it is no number for each."""
    chosen = sorted((s for s in samples if s["filter"] == filtered), key=lambda s: s["doc_id"])
    values = [_number(metric, s.get(metric)) for s in chosen]
    return [v for v in values if v is not None] if None not in values else []


def _number(metric: str, value: Any) -> float | None:
    """Return a document's value as a number; (log-likelihood, bytes) becomes the log-likelihood of a byte."""
    if _is_number(value):
        return float(value)
    return float(value[0] / value[1]) if metric in _WEIGHTED and value[1] else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))


def _stderr(figure: float, values: Sequence[float]) -> float | None:
    """Return the standard error of a mean over documents, or of exp(-mean) to first order; None for others."""
    if len(values) < 2:
        return None
    mean, stderr = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    if np.isclose(figure, mean):
        return stderr
    return figure * stderr if np.isclose(figure, np.exp(-mean)) else None


def average(results: Sequence[TaskResult]) -> MetricResult | None:
    """Return the mean of the headline accuracies; tasks are independent, so their variances add up."""
    rows = [m for task in results for m in task.metrics if m.headline and m.higher_is_better and m.paired]
    if not rows:
        return None

    def combined(errors: Sequence[float | None]) -> float | None:
        known = [e for e in errors if e is not None]
        return float(np.sqrt(np.square(known).sum()) / len(rows)) if len(known) == len(rows) else None

    paired = [m.paired for m in rows if m.paired]
    difference, stderr = float(np.mean([p.difference for p in paired])), combined([p.stderr for p in paired])
    return MetricResult(
        "average",
        float(np.mean([m.original for m in rows])),
        float(np.mean([m.compressed for m in rows])),
        combined([m.original_stderr for m in rows]),
        combined([m.compressed_stderr for m in rows]),
        _average_paired(paired, difference, stderr),
        higher_is_better=True,
        headline=True,
    )


def _average_paired(paired: Sequence[Paired], difference: float, stderr: float | None) -> Paired:
    p_value = float(2 * stats.norm.sf(abs(difference) / stderr)) if stderr else float(difference == 0)
    higher, lower, n = (sum(getattr(p, field) for p in paired) for field in ("higher", "lower", "n"))
    return Paired(difference, stderr, p_value, "normal", higher, lower, n)
