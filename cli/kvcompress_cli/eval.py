"""`kvcompress eval`: what the compressed cache costs, on a text, on tasks or in long contexts; decode-faithful."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, terminal

if TYPE_CHECKING:
    from kvcompress.evaluate.perplexity import Evaluation
    from kvcompress_cli.loading import Loaded

_TASKS, _LONG, _HOW = "Tasks", "Long context", "How it runs"
#: Text for questions that do not depend on what the text says.
_ANY_TEXT = "builtin:prose"


@dataclass(frozen=True)
class EvalOptions:
    """The options of `kvcompress eval` that are not about where and how the model is loaded."""

    text: str | None
    seq_len: int | None
    max_windows: int | None
    recent: int | None
    sinks: int | None
    limit: int | None
    fewshot: int | None
    lengths: str
    depths: str
    prompts: int | None
    prompt_tokens: int
    new_tokens: int
    batch_size: int | None
    answers: Path | None


def evaluate(
    output: flags.CompressedDirectory,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Perplexity on this text file, JSONL, directory or datasets id.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens in a window; each window stands alone.", show_default="2048; by position 8192"
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many windows.", show_default="the whole text")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=0, help="Latest tokens that stay exact.", show_default="as compressed")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(min=0, help="First tokens that stay exact.", show_default="as compressed")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="lm-eval tasks, .jsonl files or directories, with commas.", rich_help_panel=_TASKS
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first documents of each task.", rich_help_panel=_TASKS)
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples before each question.", show_default="the task's own", rich_help_panel=_TASKS
        ),
    ] = None,
    retrieval: Annotated[
        bool, typer.Option("--retrieval", help="Find keys hidden in a text (--text).", rich_help_panel=_LONG)
    ] = False,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, with commas.", rich_help_panel=_LONG)
    ] = "1024,2048,4096",
    depths: Annotated[
        str, typer.Option(help="Where the key is: 0 first, 1 last.", rich_help_panel=_LONG)
    ] = "0,0.25,0.5,0.75,0.9",
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Perplexity on --text by position.", rich_help_panel=_LONG)
    ] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Compare greedy continuations.", rich_help_panel=_LONG)
    ] = False,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts: of each kind, length and depth, or to continue.",
            show_default="10 or 8",
            rich_help_panel=_LONG,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt to continue.", rich_help_panel=_LONG)
    ] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to continue it with.", rich_help_panel=_LONG)] = 128,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Most inputs in a batch.", show_default="by their length", rich_help_panel=_HOW),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep each answer here; a killed run continues from it.", rich_help_panel=_HOW
        ),
    ] = None,
    base: flags.Base = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    json: flags.Json = False,
) -> None:
    """Compare with the uncompressed model: perplexity (--text), --tasks, --retrieval, --by-position or --generation.

    Every token attends to the compressed form of all tokens older than the window, as in generation.
    """
    mode = _mode(text=text, tasks=tasks, retrieval=retrieval, by_position=by_position, generation=generation)
    options = EvalOptions(
        text,
        seq_len,
        max_windows,
        recent,
        sinks,
        limit,
        fewshot,
        lengths,
        depths,
        prompts,
        prompt_tokens,
        new_tokens,
        batch_size,
        answers,
    )
    run, show = _runner(mode, options, tasks)
    from kvcompress_cli.loading import load_compressed

    loaded = load_compressed(output, base=base, device=device, dtype=dtype, with_original=True)
    result = run(loaded)
    if json:
        terminal.print_json(result.to_json())
    else:
        show(result)


def _mode(*, text: str | None, tasks: str | None, retrieval: bool, by_position: bool, generation: bool) -> str:
    """Return what is asked for. Raises OptionError if that is nothing, or two things."""
    from kvcompress.errors import OptionError

    asked = {"--tasks": tasks is not None, "--retrieval": retrieval, "--by-position": by_position}
    chosen = [name for name, on in (asked | {"--generation": generation}).items() if on]
    if len(chosen) > 1:
        raise OptionError(f"{chosen[0]} and {chosen[1]} are two evaluations. Run them one after the other.")
    mode = chosen[0] if chosen else "--text"
    if mode in ("--text", "--by-position") and text is None:
        raise OptionError("nothing to evaluate on. Name a text with --text, or choose --tasks or --retrieval.")
    return mode


def _runner(mode: str, options: EvalOptions, tasks: str | None) -> tuple[Any, Any]:
    """Return (what turns a loaded model into a result, what prints that); options are checked here."""
    if mode == "--tasks":
        from kvcompress_cli import eval_tasks

        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        return (lambda loaded: eval_tasks.run(loaded, names, options)), eval_tasks.show
    if mode == "--text":
        return (
            lambda loaded: measure(
                loaded,
                str(options.text),
                seq_len=options.seq_len or 2048,
                max_windows=options.max_windows,
                recent=options.recent,
                sinks=options.sinks,
            )
        ), print_evaluation
    from kvcompress_cli import eval_context

    return eval_context.runner(mode, options, options.text or _ANY_TEXT)


def measure(
    loaded: Loaded,
    text: str,
    *,
    seq_len: int,
    max_windows: int | None,
    recent: int | None = None,
    sinks: int | None = None,
) -> Evaluation:
    """Return the library's evaluation, with progress on stderr."""
    from kvcompress.evaluate.perplexity import evaluate as evaluate_model
    from kvcompress_cli.progress import stage_progress

    with stage_progress() as progress:
        return evaluate_model(
            loaded.model,
            loaded.tokenizer,
            text,
            original=loaded.original,
            seq_len=seq_len,
            max_windows=max_windows,
            recent=recent,
            sinks=sinks,
            progress=lambda done, total: progress("eval", done, total),
        )


def print_evaluation(evaluation: Evaluation) -> None:
    from rich.markup import escape

    perplexity, protocol = evaluation.perplexity, evaluation.protocol
    grid = terminal.facts()
    grid.add_row("perplexity, original", f"{perplexity['original']:.4f}")
    grid.add_row("perplexity, compressed", f"{perplexity['compressed']:.4f}")
    grid.add_row("ratio", f"[bold]{perplexity['ratio']:.4f}[/bold]")
    grid.add_row("KL to the original", f"{evaluation.kl_nats:.5f} nats a token")
    grid.add_row("same most likely token", f"{evaluation.top1_agreement:.2%}")
    grid.add_row("keep", f"{evaluation.keep:.4f} of the cache's bytes, beyond the window")
    grid.add_row(
        "protocol",
        f"{escape(protocol['text'])} (sha256 {protocol['text_sha256'][:12]}), {protocol['windows']} windows of "
        f"{protocol['seq_len']}, {protocol['sinks']} sinks, {protocol['recent']} recent, {protocol['dtype']}",
    )
    terminal.stdout().print(grid)
