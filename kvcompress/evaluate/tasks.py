"""Accuracy on question-answering tasks, compressed against original, through EleutherAI's lm-eval.

Any task of lm-eval runs, and so do local JSONL files (docs/tasks.md), without a network. Likelihoods are
decode-faithful; generating tasks use the real compressed cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.errors import OptionError
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.paired import Paired, compare_paired
from kvcompress.evaluate.scoring import Pair, encode_pair
from kvcompress.evaluate.sides import Side, both_sides, dtype_name
from kvcompress.evaluate.task_files import LocalTask, find_task_files, load_task
from kvcompress.runtime.attach import attachment_of

#: Called with what runs ("original" or "compressed"), how many requests are done, and of how many.
TaskProgress = Callable[[str, int, int], None]

_FEWSHOT_SEED = 1234  # lm-eval's default


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
    """One task. compressed_share: of all tokens that scored tokens attend to, the share that is seen compressed."""

    task: str
    n_documents: int
    n_fewshot: int
    compressed_share: float
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


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    original: Any | None = None,
    limit: int | None = None,
    n_fewshot: int | None = None,
    batch_size: int = 64,
    answers: Path | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    progress: TaskProgress | None = None,
) -> TaskEvaluation:
    """Return how an attached model and its original answer tasks: names of lm-eval's, .jsonl files, directories.

    limit: only the first documents of each task. n_fewshot: examples before each question, the task's own number by
    default. answers: a file that keeps each answer, so that a killed run continues. original: for a folded model.
    Raises OptionError if lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    if not tasks:
        raise OptionError("no task is named. Name tasks of lm-eval, .jsonl files or directories of them.")
    _check_lm_eval()
    sides = both_sides(model, original=original, sinks=sinks, recent=recent)
    names, local = _resolve(tasks)
    with Answers(answers) as known, _quiet_lm_eval(), _explained(names):
        loaded = _load(names, local, n_fewshot)
        runs = [_run(side, tokenizer, loaded, known, limit, batch_size, progress) for side in sides]
    results = tuple(_task_result(name, runs, local) for name in sorted(runs[0].samples, key=_given_order(names, local)))
    protocol = {
        "lm_eval": runs[0].version,
        "sinks": sides[1].sinks,
        "recent": sides[1].recent,
        "dtype": dtype_name(model),
        "limit": limit,
    }
    plan = attachment_of(model).plan
    return TaskEvaluation(results, _average(results), plan.keep, protocol)


def score_task_files(
    side: Side,
    tokenizer: Any,
    files: Sequence[Path],
    answers: Answers,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Answer the requests of local tasks into `answers` without lm-eval, and return how many there are.

    For machines that have no lm-eval: `evaluate_tasks` with the same file of answers then computes the metrics.
    """
    pairs: list[Pair] = []
    for file in files:
        task = load_task(file)
        for document in task.documents[:limit]:
            pairs.extend(encode_pair(tokenizer, *request) for request in task.requests(document))
    answers.scores(side, pairs, batch_size=batch_size, progress=progress)
    return len(pairs)


@dataclass(frozen=True, slots=True)
class _Run:
    """One side's results: lm-eval's metrics, each document's values, and shares seen compressed, by task."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    higher_is_better: dict[str, dict[str, bool]]
    n_fewshot: dict[str, int]
    shares: dict[str, float]
    version: str


def _load(names: list[str], local: dict[str, LocalTask], n_fewshot: int | None) -> Any:
    """Return lm-eval's tasks with their documents, loaded once so that both sides get the same questions."""
    from lm_eval.tasks import TaskManager

    from kvcompress.evaluate.lm_eval_model import FileTask

    manager = TaskManager(include_defaults=bool(names))
    _check_names(names, manager)
    loaded = manager.load([*names, *(FileTask(task) for task in local.values())])
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (n_fewshot is not None and own != 0):  # 0 in a task's own file is meant, as in lm-eval
            task.set_config(key="num_fewshot", value=n_fewshot or 0)
    return loaded


def _run(
    side: Side,
    tokenizer: Any,
    loaded: Any,
    answers: Answers,
    limit: int | None,
    batch_size: int,
    progress: TaskProgress | None,
) -> _Run:
    import lm_eval

    from kvcompress.evaluate.lm_eval_model import SideLM

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    report = None if progress is None else partial(progress, side.name)
    lm = SideLM(side, tokenizer, answers=answers, batch_size=batch_size, progress=report)
    # lm-eval's own bootstrap prints and starts processes; standard errors come from the documents' values instead
    document = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    return _Run(
        document["results"],
        document["samples"],
        document["higher_is_better"],
        document["n-shot"],
        {name: lm.share_compressed(name) for name in document["samples"]},
        str(lm_eval.__version__),
    )


def _task_result(name: str, runs: Sequence[_Run], local: dict[str, LocalTask]) -> TaskResult:
    exact, coded = runs
    metrics = [key for key in exact.results[name] if "," in key and "_stderr," not in key]
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
    values = [_number(s.get(metric)) for s in chosen]
    return [v for v in values if v is not None] if None not in values else []


def _number(value: Any) -> float | None:
    """Return a document's value as a number; (log-likelihood, bytes) becomes the log-likelihood of a byte."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return float(value[0] / value[1]) if value[1] else None
    return None


def _stderr(figure: float, values: Sequence[float]) -> float | None:
    """Return the standard error of a mean over documents, or of exp(-mean) to first order; None for others."""
    if len(values) < 2:
        return None
    mean, stderr = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    if np.isclose(figure, mean):
        return stderr
    return figure * stderr if np.isclose(figure, np.exp(-mean)) else None


def _average(results: Sequence[TaskResult]) -> MetricResult | None:
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
    from scipy import stats

    p_value = float(2 * stats.norm.sf(abs(difference) / stderr)) if stderr else float(difference == 0)
    higher, lower, n = (sum(getattr(p, field) for p in paired) for field in ("higher", "lower", "n"))
    return Paired(difference, stderr, p_value, "normal", higher, lower, n)


def _resolve(tasks: Sequence[str]) -> tuple[list[str], dict[str, LocalTask]]:
    """Return (names of lm-eval's tasks, local tasks by name)."""
    names, local = [], {}
    for name in tasks:
        files = find_task_files(name)
        if not files:
            names.append(name)
        for file in files:
            task = load_task(file)
            if task.name in local:
                raise OptionError(f"two task files are called {task.name}. Rename one.")
            local[task.name] = task
    return names, local


def _given_order(names: Sequence[str], local: dict[str, LocalTask]) -> Callable[[str], tuple[int, str]]:
    order = {name: i for i, name in enumerate([*names, *local])}
    return lambda name: (order.get(name, len(order)), name)


def _check_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise OptionError(f"tasks need lm-eval ({error}): pip install 'kvcompress[tasks]'.") from error


def _check_names(names: Sequence[str], manager: Any) -> None:
    unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
    if unknown:
        raise OptionError(
            f"task {unknown[0]} is unknown: lm-eval has no task of this name, and there is no such file or directory."
        )


@contextmanager
def _explained(names: Sequence[str]) -> Iterator[None]:
    """Turn what data sets that cannot be had raise into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not names:  # local files were read before: this is a bug
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(f"lm-eval cannot run {', '.join(names)}: {first}") from error


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Keep the logging of lm-eval and of what it downloads with off the terminal within the block."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
