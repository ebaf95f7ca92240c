"""compare(): every method at every budget, and the peers, on the same windows of one loaded model.

The model is calibrated once, its uncompressed states are computed once for each window, and the document is written
anew after every cell, so that a comparison that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kvcompress.calibration.calibrate import Progress
from kvcompress.calibration.pieces import Workers
from kvcompress.calibration.text import check_there
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.checkpoint.writer import atomic_file, make_directory
from kvcompress.errors import OptionError
from kvcompress.evaluate.compare_document import document_of
from kvcompress.evaluate.measured_cells import CellBench
from kvcompress.evaluate.methods import Request as Request
from kvcompress.evaluate.peers import Peer
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.report.stored_comparison import COMPARISON_FILE as COMPARISON_FILE
from kvcompress.report.stored_comparison import read_comparison


def compare(
    source: str | Path,
    output: Path,
    request: Request,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the document of a comparison, which is also kept in output/compare.json.

    source: an uncompressed checkpoint. output: a directory; finished cells of an earlier call with the same model,
    text and settings are taken from it. workers: who measures cells, each with a model of its own; output must be on a
    disk of theirs, too. Progress stages: sample, calibrate, compare (in windows of all cells).
    Raises a KVCompressError, before anything is measured where possible.
    """
    report = progress or (lambda *_: None)
    cells = request.cells()
    check_there(request.text)
    with open_checkpoint(source) as checkpoint:
        for cell in cells:
            # a format that cannot store such heads, or a budget that is too small, is a row that says so
            if isinstance(cell.peer, Peer) and not cell.peer.form:
                cell.peer.check(checkpoint.spec, request.seq_len)
                cell.peer.new_cache(1, torch.float32)  # raises where its package is missing
        _check_window(request)
        bench = CellBench(checkpoint, output, request, device, dtype, report)
        keys = [bench.key(cell) for cell in cells]
        done = {key: row for key, row in _finished(output / COMPARISON_FILE).items() if key in keys}

        def document_now() -> dict[str, Any]:
            rows = [done[key] for key in keys if key in done]
            found = document_of(checkpoint, request.to_json(), bench.protocol, device, rows)
            return found | {"complete": len(rows) == len(cells)}

        document = document_now()
        make_directory(output)  # not before: a text that is missing leaves nothing behind
        left = [(index, cell) for index, cell in enumerate(cells) if keys[index] not in done]
        for index, row in bench.measured(left, workers, len(cells)):
            done[keys[index]] = {"key": keys[index], **row}
            document = document_now()
            _write(document, output)
        _write(document, output)  # also where an earlier, larger request had measured every cell
    return document


def _write(document: dict[str, Any], output: Path) -> None:
    with atomic_file(output / COMPARISON_FILE) as scratch:
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _check_window(request: Request) -> None:
    recent = request.options.recent
    if request.seq_len // 2 <= recent + BLOCK_TOKENS:
        raise OptionError(
            f"windows of {request.seq_len} tokens hardly leave the recent window of {recent}. "
            "Raise --seq-len or lower --recent."
        )


def _finished(file: Path) -> dict[str, dict[str, Any]]:
    """Return {key: row} of an earlier call's cells."""
    return {row["key"]: row for row in read_comparison(file)["cells"]} if file.is_file() else {}
