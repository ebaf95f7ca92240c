"""The app: its commands, `--version`, and the entry point."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from inspect import cleandoc
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from kvcompress_cli.bench import bench
from kvcompress_cli.compare import compare
from kvcompress_cli.compress import compress
from kvcompress_cli.demo import demo
from kvcompress_cli.eval import evaluate
from kvcompress_cli.export import export
from kvcompress_cli.failures import OneLineFailures
from kvcompress_cli.generate import generate
from kvcompress_cli.heal import heal
from kvcompress_cli.inspect import inspect
from kvcompress_cli.push import push
from kvcompress_cli.report import report

app = typer.Typer(
    name="kvcompress",
    cls=OneLineFailures,
    help="Make the KV cache of a trained LLM several times smaller, without retraining, and run the result.",
    epilog="Begin with: kvcompress demo",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(command: Callable[..., None], example: str) -> None:
    """Add a command, named as its example begins; paragraphs of its docstring wrap where the terminal ends."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    wrapped = "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
    app.command(example.split()[0], help=wrapped, epilog=f"Example: kvcompress {example}")(command)


_add(demo, "demo --keep 0.125")
_add(inspect, "inspect ./SmolLM2-135M")
_add(compress, "compress ./SmolLM2-135M ./small --keep 0.25 --calibration notes.txt")
_add(report, "report ./small --html report.html")
_add(evaluate, "eval ./small --text book.txt --max-windows 20")
_add(generate, 'generate ./small --prompt "Once upon a time" --max-new-tokens 100')
_add(compare, "compare ./SmolLM2-135M --keep 0.25,0.125 --text book.txt")
_add(heal, "heal ./small --text notes.txt --tokens 4000000 -o ./healed")
_add(export, "export ./small --to gguf -o small.gguf --verify")
_add(push, "push ./small someone/SmolLM2-135M-kv25 --base HuggingFaceTB/SmolLM2-135M")
_add(bench, "bench --shape llama-3-8b --keep 0.125,0.25")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from kvcompress import __version__

        typer.echo(f"kvcompress {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def show_notes() -> None:
    """Let every Note of the library be one line on stderr, once."""
    from kvcompress.errors import Note

    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Note):
            typer.echo(f"note: {message}", err=True)
        else:
            others(message, category, *place, **more)

    warnings.filterwarnings("once", category=Note)
    warnings.showwarning = show


def show_any_text() -> None:
    """Let what is printed hold any character, as a model's text does, also where the locale is ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the app as its own process, where the libraries' warnings and progress bars may be turned off.

    Environment variables that are set, and warnings asked for with -W, are left alone.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it tells every attempt to reach a hub that is not there
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws bars of its own
    # Threads of torch spin while they wait for each other, which beside other work is for processors that they hold up.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    show_any_text()
    show_notes()
    app()
