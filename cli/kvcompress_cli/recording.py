"""What a command measured, kept in the output directory for its report and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def record(output: Path, kind: str, figures: dict[str, Any]) -> None:
    """Write figures (with their `protocol`) to OUT/evaluations.json and into the card.

    They were printed already, so that a directory that cannot be written to is worth a note, not a failure.
    """
    from kvcompress.errors import KVCompressError
    from kvcompress.evaluations import record_evaluation
    from kvcompress.report.card import update_card

    try:
        update_card(output, record_evaluation(output, kind, figures))
    except KVCompressError as error:
        typer.echo(f"note: not recorded for the report: {error}", err=True)
