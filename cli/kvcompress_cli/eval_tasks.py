"""`kvcompress eval --tasks`: accuracies of the original and the compressed model side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress_cli import terminal

if TYPE_CHECKING:
    from pathlib import Path

    from kvcompress.evaluate.task_results import MetricResult, TaskEvaluation
    from kvcompress_cli.eval_options import EvalOptions
    from kvcompress_cli.loading import Loaded


def check(options: EvalOptions) -> None:
    """Raise OptionError, before a model is loaded, without lm-eval or for files of tasks that cannot be read."""
    from kvcompress.evaluate.tasks import check_tasks

    check_tasks(_names(options))


def run(loaded: Loaded, options: EvalOptions, *, engine: Path | None = None) -> TaskEvaluation:
    """Return the library's evaluation, with progress on stderr. engine: the output, to be run in vLLM."""
    from kvcompress.evaluate.engine_tasks import EngineAnswerer
    from kvcompress.evaluate.tasks import evaluate_tasks
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_tasks(
            loaded.model,
            loaded.tokenizer,
            _names(options),
            original=loaded.original,
            limit=options.limit,
            n_fewshot=options.fewshot,
            batch_size=options.batch_size or 64,
            answers=options.answers,
            sinks=options.sinks,
            recent=options.recent,
            answerer=None if engine is None else EngineAnswerer.beside(loaded.model, engine),
            progress=progress,
        )


def _names(options: EvalOptions) -> list[str]:
    return [name.strip() for name in (options.tasks or "").split(",") if name.strip()]


def show(evaluation: TaskEvaluation) -> None:
    console = terminal.stdout()
    table = terminal.table("task, metric", ">original", ">compressed", ">difference", ">p", ">far")
    for task in evaluation.tasks:
        table.add_row(
            task.task, "", "", "", "", "" if task.compressed_share is None else f"{task.compressed_share:.0%}"
        )
        for metric in task.metrics:
            table.add_row(f"  {metric.metric}{'*' if metric.headline else ''}", *_cells(metric), "")
    if evaluation.average:
        table.add_section()
        table.add_row("average of *", *_cells(evaluation.average), "")
    console.print(table)
    protocol = evaluation.protocol
    n = sum(task.n_documents for task in evaluation.tasks)
    console.print(
        f"[dim]keep {evaluation.keep:.4f}; {n:,} documents; {protocol['sinks']} sinks, {protocol['recent']} recent, "
        f"{protocol['dtype']}, lm-eval {protocol['lm_eval']}\n"
        "Accuracies in percent, ± a standard error. difference: on the same documents (perplexities: of the "
        "log-likelihood); p: paired test of no difference; far: what share of the tokens that a scored token attends "
        "to it sees compressed.[/dim]"
    )


def _cells(metric: MetricResult) -> list[str]:
    """Return original, compressed, their difference and its p-value."""
    scale = 100.0 if metric.higher_is_better and max(metric.original, metric.compressed) <= 1 else 1.0
    paired = metric.paired
    if paired is None:
        difference = p_value = ""
    else:
        difference = _with_error(paired.difference, paired.stderr, scale, sign="+")
        p_value = f"{paired.p_value:.2f}"
    original = _with_error(metric.original, metric.original_stderr, scale)
    return [original, _with_error(metric.compressed, metric.compressed_stderr, scale), difference, p_value]


def _with_error(value: float, stderr: float | None, scale: float, *, sign: str = "") -> str:
    digits = ".2f" if scale != 1 or sign else ",.0f" if abs(value) >= 10_000 else ".4g"
    return f"{scale * value:{sign}{digits}}" + (f" ±{scale * stderr:{digits}}" if stderr is not None else "")
