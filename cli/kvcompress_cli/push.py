"""`kvcompress push`: an output as a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvcompress_cli import flags, terminal


def push(
    output: flags.CompressedDirectory,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository; it is made if need be.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="The original model's repository.",
            show_default="where OUT was compressed from, if that was the hub",
        ),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Everything in OUT, weights too, instead of the maps.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    json: flags.Json = False,
) -> None:
    """Upload the maps, the plan, the report, what eval measured and a model card, with your Hugging Face token.

    Paths of this machine are left out of what is sent.
    """
    from kvcompress.publish import publish

    published = publish(output, repository, base=base, everything=all, private=private)
    if json:
        terminal.print_json(asdict(published))
        return
    grid = terminal.facts()
    for name, n_bytes in published.files.items():
        grid.add_row(terminal.size(n_bytes), name)
    terminal.stdout().print(grid)
    typer.echo(f"{published.url} ({'private' if published.private else 'public'})")
