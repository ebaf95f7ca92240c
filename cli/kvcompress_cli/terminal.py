"""What is printed: JSON, tables on stdout, small bars, and sizes in words."""

from __future__ import annotations

from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kvcompress.report.wording import json_text
from kvcompress.report.wording import size as size
from kvcompress.report.wording import tokens as tokens

#: An eighth, two eighths, ... of a character, from the left.
_EIGHTHS = " ▏▎▍▌▋▊▉"


def print_json(document: Any) -> None:
    """Print JSON that any reader takes; see report.wording.json_text."""
    typer.echo(json_text(document, indent=2))


def stdout() -> Console:
    """Return the console that results are printed on: its width, colours and encoding follow where stdout goes."""
    return Console(highlight=False, soft_wrap=False)


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; a column whose name begins with '>' is aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for name in columns:
        result.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return result


def facts() -> Table:
    """Return an empty grid of names and what belongs to them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    return grid


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """Return a bar that fills `share` of `width` characters, padded to the width."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    if ascii_only:
        return ("#" * round(eighths / 8)).ljust(width)
    return ("█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(width)
