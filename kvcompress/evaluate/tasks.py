"""Accuracy on question-answering tasks, compressed against original, through EleutherAI's lm-eval.

Any task of lm-eval runs, and so do local JSONL files (docs/evaluation.md), without a network. Likelihoods are
decode-faithful; generating tasks use the real compressed cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.errors import OptionError
from kvcompress.evaluate.answers import Answers
from kvcompress.evaluate.engine_tasks import EngineAnswerer
from kvcompress.evaluate.scoring import Pair, encode_pair
from kvcompress.evaluate.sides import Side, both_sides, dtype_name
from kvcompress.evaluate.task_files import LocalTask, find_task_files, load_task
from kvcompress.evaluate.task_results import SideRun, TaskEvaluation, average, task_result
from kvcompress.runtime.attach import attachment_of

if TYPE_CHECKING:
    from kvcompress.evaluate.lm_eval_model import SideLM

#: Called with what runs ("original" or "compressed"), how many requests are done, and of how many.
TaskProgress = Callable[[str, int, int], None]

_FEWSHOT_SEED = 1234  # lm-eval's default


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
    answerer: EngineAnswerer | None = None,
    progress: TaskProgress | None = None,
) -> TaskEvaluation:
    """Return how an attached model and its original answer tasks: names of lm-eval's, .jsonl files, directories.

    limit: only the first documents of each task. n_fewshot: examples before each question, the task's own number by
    default. answers: a file that keeps each answer, so that a killed run continues. original: for a folded model.
    answerer: an engine that answers for the compressed side. Raises OptionError if lm-eval is not installed, a task is
    unknown, or its data cannot be had.
    """
    names, local = check_tasks(tasks)
    sides = both_sides(model, original=original, sinks=sinks, recent=recent)
    with Answers(answers) as known, _quiet_lm_eval():
        with _explained(names):
            loaded = _load(names, local, n_fewshot)
        models = _models(sides, tokenizer, known, batch_size, answerer, progress)
        runs = [_run(lm, loaded, limit) for lm in models]
    results = tuple(task_result(name, runs, local) for name in sorted(runs[0].samples, key=_given_order(names, local)))
    protocol = {
        "lm_eval": runs[0].version,
        "sinks": sides[1].sinks,
        "recent": sides[1].recent,
        "dtype": dtype_name(model),
        "limit": limit,
        "tasks": [result.task for result in results],
        "n_fewshot": sorted({result.n_fewshot for result in results}),
    }
    if answerer is not None:
        protocol["engine"] = "vllm"
    plan = attachment_of(model).plan
    return TaskEvaluation(results, average(results), plan.keep, protocol)


def check_tasks(tasks: Sequence[str]) -> tuple[list[str], dict[str, LocalTask]]:
    """Return (names of lm-eval's tasks, local tasks by name), which needs no model.

    Raises OptionError if none is named, lm-eval is not installed, or a file cannot be read.
    """
    if not tasks:
        raise OptionError("no task is named. Name tasks of lm-eval, .jsonl files or directories of them.")
    _check_lm_eval()
    return _resolve(tasks)


def task_pairs(tokenizer: Any, files: Sequence[Path], *, limit: int | None = None) -> list[Pair]:
    """Return all that a model is asked by local tasks, without lm-eval.

    For machines that have no lm-eval: `Answers.scores` keeps a side's answers to these pairs in a file, from which
    `evaluate_tasks` elsewhere computes the metrics.
    """
    pairs: list[Pair] = []
    for file in files:
        task = load_task(file)
        for document in task.documents[:limit]:
            pairs.extend(encode_pair(tokenizer, *request) for request in task.requests(document))
    return pairs


def lm_eval_pairs(
    tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, n_fewshot: int | None = None
) -> list[Pair]:
    """Return all that a model is asked by tasks of lm-eval and local ones, few-shot examples included.

    The answers can then be collected where lm-eval is missing. Only what is scored, not what is generated. Raises
    OptionError as `evaluate_tasks` does.
    """
    names, local = check_tasks(tasks)
    pairs: list[Pair] = []
    with _quiet_lm_eval(), _explained(names):
        for task in _load(names, local, n_fewshot)["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            asked = [i.args for i in task.instances if i.request_type == "loglikelihood"]
            pairs.extend(encode_pair(tokenizer, *arguments) for arguments in asked)
    return pairs


def _load(names: list[str], local: dict[str, LocalTask], n_fewshot: int | None) -> Any:
    """Return lm-eval's tasks with their documents, loaded once so that both sides get the same questions."""
    from lm_eval.tasks import TaskManager

    from kvcompress.evaluate.lm_eval_model import FileTask

    for local_task in local.values():
        if n_fewshot and n_fewshot >= len(local_task.documents):
            found = len(local_task.documents)
            raise OptionError(f"task {local_task.name} has {found} documents, too few for {n_fewshot} examples each.")
    manager = TaskManager(include_defaults=bool(names))
    _check_names(names, manager)
    loaded = manager.load([*names, *(FileTask(task) for task in local.values())])
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
            reason = "images or sound" if getattr(task, "MULTIMODAL", False) else "running code that a model wrote"
            raise OptionError(f"task {name} needs {reason}, which kvcompress does not do. Leave it out.")
        own = task.get_config("num_fewshot")
        if own is None or (n_fewshot is not None and own != 0):  # 0 in a task's own file is meant, as in lm-eval
            task.set_config(key="num_fewshot", value=n_fewshot or 0)
    return loaded


def _models(
    sides: Sequence[Side],
    tokenizer: Any,
    answers: Answers,
    batch_size: int,
    answerer: EngineAnswerer | None,
    progress: TaskProgress | None,
) -> Iterator[SideLM]:
    """Yield the sides as models of lm-eval."""
    from kvcompress.evaluate.lm_eval_model import EngineLM, SideLM

    for side in sides:
        if side.attachment is not None and answerer is not None:
            in_engine = replace(side, fingerprint=f"{side.fingerprint}-vllm")
            yield EngineLM(in_engine, tokenizer, answerer=answerer, answers=answers)
        else:
            report = None if progress is None else partial(progress, side.name)
            yield SideLM(side, tokenizer, answers=answers, batch_size=batch_size, progress=report)


def _run(lm: SideLM, loaded: Any, limit: int | None) -> SideRun:
    import lm_eval

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    # lm-eval's own bootstrap prints and starts processes; standard errors come from the documents' values instead
    document = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    return SideRun(
        document["results"],
        document["samples"],
        document["higher_is_better"],
        document["n-shot"],
        {name: lm.share_compressed(name) for name in document["samples"]},
        str(lm_eval.__version__),
    )


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
