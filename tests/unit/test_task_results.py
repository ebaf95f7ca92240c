"""Task results from what lm-eval returns: metrics of every shape, headlines, errors and the average."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvcompress.evaluate.task_files import LocalTask
from kvcompress.evaluate.task_results import SideRun, average, task_result


def run(values: dict[str, list[Any]], figures: dict[str, Any], *, better: bool = True) -> SideRun:
    """Return a run of one task "quiz"; values: each document's, figures: those of all, by "metric,filter"."""
    samples = []
    for key, column in values.items():
        metric, filtered = key.split(",")
        # in another order than that of the documents, as lm-eval may return them
        samples += [{"doc_id": i, "filter": filtered, metric: v} for i, v in reversed(list(enumerate(column)))]
    merged: dict[tuple[int, str], dict[str, Any]] = {}
    for sample in samples:
        merged.setdefault((sample["doc_id"], sample["filter"]), {}).update(sample)
    names = {key.split(",")[0] for key in figures}
    return SideRun(
        {"quiz": {"alias": "quiz", "name": "quiz", "sample_len": 4} | figures},
        {"quiz": list(merged.values())},
        {"quiz": dict.fromkeys(names, better)},
        {"quiz": 2},
        {"quiz": 0.25},
        "0",
    )


def both(first: list[Any], second: list[Any], key: str = "acc,none", **options: Any) -> list[SideRun]:
    return [run({key: v}, {key: float(np.mean(v))}, **options) for v in (first, second)]


def test_means_have_errors_and_pairs() -> None:
    task = task_result("quiz", both([1, 0, 1, 1], [1, 0, 0, 0]), {})
    (metric,) = task.metrics
    assert (task.n_documents, task.n_fewshot, task.compressed_share) == (4, 2, 0.25)
    assert (metric.metric, metric.original, metric.compressed, metric.headline) == ("acc", 0.75, 0.25, True)
    assert metric.original_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert metric.paired is not None
    assert (metric.paired.difference, metric.paired.lower, metric.paired.n) == (-0.5, 2, 4)


def test_numbers_of_numpy_are_numbers() -> None:
    (metric,) = task_result("quiz", both([np.bool_(True), np.float32(0)], [np.float64(0), np.int64(1)]), {}).metrics
    assert metric.paired is not None and (metric.paired.higher, metric.paired.lower) == (1, 1)


def test_pairs_of_answers_are_no_numbers() -> None:
    runs = [run({"f1,none": [(1, 0), (1, 1)]}, {"f1,none": 0.5}) for _ in range(2)]
    (metric,) = task_result("quiz", runs, {}).metrics
    assert (metric.original, metric.original_stderr, metric.paired) == (0.5, None, None)


def test_log_likelihoods_of_bytes() -> None:
    runs = [run({"bits_per_byte,none": [(-8.0 * k, 4), (-2.0, 2)]}, {"bits_per_byte,none": 2.0 * k}) for k in (1, 2)]
    (metric,) = task_result("quiz", runs, {}).metrics
    assert metric.paired is not None and metric.paired.difference == pytest.approx((-2 + 0) / 2)


def test_perplexity_has_an_error_to_first_order() -> None:
    losses = [-1.0, -3.0]
    runs = [run({"perplexity,none": losses}, {"perplexity,none": math.exp(2)}, better=False) for _ in range(2)]
    (metric,) = task_result("quiz", runs, {}).metrics
    assert metric.original_stderr == pytest.approx(math.exp(2) * 1.0)
    assert average([task_result("quiz", runs, {})]) is None


def test_filters_and_headlines() -> None:
    values = {"exact_match,strict": [1, 0], "exact_match,flexible": [1, 1]}
    runs = [run(values, {"exact_match,strict": 0.5, "exact_match,flexible": 1.0, "note,none": "N/A"}) for _ in range(2)]
    task = task_result("quiz", runs, {})
    assert [(m.metric, m.headline) for m in task.metrics] == [
        ("exact_match (strict)", True),
        ("exact_match (flexible)", False),
    ]
    values = {"acc,none": [1, 0], "acc_norm,none": [0, 0]}
    runs = [run(values, {"acc,none": 0.5, "acc_norm,none": 0.0}) for _ in range(2)]
    assert [m.headline for m in task_result("quiz", runs, {}).metrics] == [False, True]
    local = {"quiz": LocalTask("quiz", "mc", "acc", ())}
    assert [m.headline for m in task_result("quiz", runs, local).metrics] == [True, False]


def test_the_average_adds_variances() -> None:
    tasks = [task_result("quiz", both([1, 0, 1, 1], [1, 0, 0, 0]), {}), task_result("quiz", both([1, 0], [1, 1]), {})]
    mean = average(tasks)
    assert mean is not None and mean.paired is not None
    assert (mean.original, mean.compressed, mean.paired.difference) == (0.625, 0.625, 0)
    errors = [m.original_stderr for t in tasks for m in t.metrics]
    assert mean.original_stderr == pytest.approx(math.hypot(*errors) / 2)
    assert mean.paired.p_value == 1 and mean.paired.n == 6
