"""Progress bars on stderr, for people: nothing is drawn where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from kvcompress.heal.trainer import HealProgress

#: Stages of compress() in words, and what they count.
_STAGES = {
    "sample": ("sampling text from the model", "tokens"),
    "calibrate": ("calibrating", "tokens"),
    "layers": ("layers, there and back", "layers"),
    "read": ("weights read", "bytes"),
    "coherence": ("measuring how errors add up", "tokens"),
    "values": ("fitting values to what is read of them", "tokens"),
    "search": ("measuring budgets", "texts"),
    "fit": ("fitting bases", "sites"),
    "write": ("writing", ""),
    "eval": ("evaluating", "windows"),
    "original": ("original model", "questions"),
    "compressed": ("compressed model", "questions"),
    "generate": ("generating", "prompts"),
    "compare": ("comparing", "windows of all cells"),
}


class _Rate(ProgressColumn):
    """How far a stage is, and how fast: 12,288 of 65,536 tokens, 1,810 tokens/s."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        if not unit or task.total is None:
            return Text("")
        speed = task.finished_speed or task.speed
        if unit == "bytes":
            rate = f", {speed / 1e9:.2f} GB/s" if speed else ""
            return Text(f"{task.completed / 1e9:,.1f} of {task.total / 1e9:,.1f} GB{rate}", style="dim")
        rate = f", {speed:,.0f} {unit}/s" if speed and unit == "tokens" else ""
        return Text(f"{task.completed:,.0f} of {task.total:,.0f} {unit}{rate}", style="dim")


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (stage, done, total) that draws one bar for each stage; all are wiped at the end.

    Until the first stage reports, a moving bar says that the model is being read.
    """
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Rate(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,  # a window may take a minute on a CPU
    )
    with progress:
        reading = progress.add_task("reading the model", total=None, unit="")
        drawn: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in drawn:
                progress.update(reading, visible=False)
                label, unit = _STAGES[stage]
                drawn[stage] = progress.add_task(label, total=total, unit=unit)
            progress.update(drawn[stage], completed=done, total=total)

        yield report


@contextmanager
def training_progress() -> Iterator[Callable[[HealProgress], None]]:
    """Yield a callback that draws a training: tokens seen and a second, its loss and that on held-out text."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[pace]}", style="dim"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )
    with progress:
        task = progress.add_task("training", total=None, pace="reading the model and the text")

        def report(now: HealProgress) -> None:
            pace = f"{now.tokens:,} of {now.tokens_in_all:,} tokens, {now.tokens_per_second:,.0f} tokens/s"
            progress.update(task, completed=now.tokens, total=now.tokens_in_all, pace=pace)
            if now.loss is not None:
                progress.console.print(f"{now.tokens:>13,} tokens  loss {now.loss:.5f}", style="dim")
            if now.held_out is not None:
                kinds = ", ".join(f"{Path(k).name} {v:.5f}" for k, v in now.held_out.items())
                progress.console.print(f"{now.tokens:>13,} tokens  held-out KL, nats: {kinds}")

        yield report
