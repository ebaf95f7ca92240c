"""`kvcompress eval`: what the compressed cache costs, on a text, on tasks or in long contexts; decode-faithful."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress_cli import flags, sharing, terminal
from kvcompress_cli.eval_options import EvalOptions, check_engine, mode_of
from kvcompress_cli.eval_peers import NAMES, show_peer

if TYPE_CHECKING:
    from kvcompress_cli.loading import Loaded

_TASKS, _LONG, _HOW = "Tasks", "Long context", "How it runs"


#: What the records of each evaluation are called (evaluations.json).
_KINDS = {
    "--text": "perplexity",
    "--tasks": "tasks",
    "--retrieval": "retrieval",
    "--by-position": "positions",
    "--generation": "generation",
}


def evaluate(
    output: flags.CompressedDirectory,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="TEXT", help="Perplexity on this text file, JSONL, directory or datasets id."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens in a window; each window stands alone.", show_default="2048; by position up to 8192"
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
        str | None,
        typer.Option(help="Tokens of the prompts, with commas.", show_default="1024,2048,4096", rich_help_panel=_LONG),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Where the key is: 0 first, 1 last.", show_default="0,0.25,0.5,0.75,0.9", rich_help_panel=_LONG
        ),
    ] = None,
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
        int | None,
        typer.Option(min=1, help="Tokens of a prompt to continue.", show_default="512", rich_help_panel=_LONG),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to continue it with.", show_default="128", rich_help_panel=_LONG),
    ] = None,
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
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Measure this cache on an uncompressed MODEL instead, on --text: {NAMES}.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="vllm",
            help="Run OUT in vLLM: on --text against the run time in transformers, on --tasks against the original.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    base: flags.Base = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    gpus: sharing.Gpus = None,
    ray: sharing.Ray = None,
    per_gpu: sharing.PerGpu = 1,
    json: flags.Json = False,
) -> None:
    """Compare with the uncompressed model: perplexity (--text), --tasks, --retrieval, --by-position or --generation.

    Every token attends to the compressed form of all tokens older than the window, as in generation. The figures are
    kept in OUT (evaluations.json and its model card), for kvcompress report.
    """
    options = EvalOptions(
        text=text,
        seq_len=seq_len,
        max_windows=max_windows,
        recent=recent,
        sinks=sinks,
        tasks=tasks,
        limit=limit,
        fewshot=fewshot,
        lengths=lengths,
        depths=depths,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        answers=answers,
        cache=cache,
    )
    kinds = {"retrieval": retrieval, "by_position": by_position, "generation": generation}
    how: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
    shared = sharing.Sharing(gpus, ray, per_gpu)
    if engine is not None:
        check_engine(options, **kinds, gpus=gpus is not None, ray=ray is not None)
        _in_engine(output, options, engine=engine, **how, json=json)
        return
    mode = mode_of(options, **kinds)
    if mode == "--cache":
        _refuse_beside_cache(base=base, gpus=gpus, ray=ray)
        window = {"seq_len": seq_len or 2048, "max_windows": max_windows, "residual": recent}
        show_peer(str(output), str(cache), str(text), **window, device=device, dtype=dtype, json=json)
        return
    if shared.is_asked:
        from kvcompress_cli import eval_perplexity

        eval_perplexity.show_shared(output, mode, options, **how, shared=shared, json=json)
        return
    _measure(output, mode, options, **how, json=json)


def _refuse_beside_cache(**given: str | None) -> None:
    """Raise OptionError for what would do nothing with --cache."""
    from kvcompress.errors import OptionError

    for name, value in given.items():
        if value is not None:
            raise OptionError(f"--cache measures MODEL itself, in this process. Leave out --{name}.")


def _measure(output: Path, mode: str, options: EvalOptions, *, json: bool, **how: Any) -> None:
    """Evaluate, print the figures and keep them in `output`."""
    run, show = _runner(mode, options)
    from kvcompress_cli.loading import load_compressed
    from kvcompress_cli.recording import record

    loaded = load_compressed(output, **how, with_original=True)
    result = run(loaded)
    if json:
        terminal.print_json(result.to_json())
    else:
        show(result)
    record(output, _KINDS[mode], result.to_json())


def _in_engine(output: Path, options: EvalOptions, *, json: bool, **how: Any) -> None:
    from kvcompress_cli import eval_engine, eval_tasks

    if options.tasks is not None:
        eval_tasks.check(options)
    loaded = eval_engine.load_beside(output, **how)
    if options.tasks is None:
        eval_engine.show_engine(loaded, output, options, json=json)
        return
    evaluation = eval_tasks.run(loaded, options, engine=output)
    if json:
        terminal.print_json(evaluation.to_json())
    else:
        eval_tasks.show(evaluation)


def _runner(mode: str, options: EvalOptions) -> tuple[Callable[[Loaded], Any], Callable[[Any], None]]:
    """Return (what turns a loaded model into a result, what prints that). Raises OptionError for a bad list."""
    if mode == "--tasks":
        from kvcompress_cli import eval_tasks

        eval_tasks.check(options)
        return partial(eval_tasks.run, options=options), eval_tasks.show
    if mode == "--text":
        from kvcompress_cli import eval_perplexity

        return partial(eval_perplexity.run, options=options), eval_perplexity.show
    from kvcompress_cli import eval_context

    return eval_context.runner(mode, options)
