"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

CompressedDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="A directory made by kvcompress compress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The original checkpoint, for an output that is folded or holds only maps.",
        show_default="the one recorded in OUT",
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on a CPU, the checkpoint's own on a GPU), float32, bfloat16 or float16.")
]


def refuse_idle(command: typer.Context, names: Iterable[str], when: str) -> None:
    """Raise OptionError for an option of the command line that would do nothing; when: "without --verify"."""
    from kvcompress.errors import OptionError

    for name in names:
        source = command.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise OptionError(f"--{name.replace('_', '-')} does nothing {when}. Leave it out.")
