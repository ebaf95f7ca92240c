"""Arguments and options that several commands share."""

from __future__ import annotations

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
