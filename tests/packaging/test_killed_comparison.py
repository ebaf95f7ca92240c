"""`kill -9` in the middle of a comparison: finished cells are kept as they were, and the next call does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvcompress.evaluate.compare import COMPARISON_FILE, Request, compare
from kvcompress.evaluate.measured_cells import CellBench
from kvcompress.options import CompressOptions

#: Compares in a process that dies in the middle of a window of its third cell.
_PROGRAM = """
import os, signal, sys
from pathlib import Path
from kvcompress.evaluate.compare import Request, compare
from kvcompress.options import CompressOptions

source, text, output, methods = sys.argv[1:]

def die(stage, done, total):
    if (stage, done) == ("compare", 5):
        os.kill(os.getpid(), signal.SIGKILL)

options = CompressOptions(metric="weights", policy="uniform", recent=8, seq_len=256)
request = Request(tuple(methods.split(",")), (0.5,), text, options, seq_len=256, max_windows=2)
compare(source, Path(output), request, progress=die)
"""
METHODS = ("fp8", "kivi")


def test_killed_and_resumed(tiny_checkpoint: Any, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    source = tiny_checkpoint("llama-mha")
    arguments = [source, text_file, tmp_path, ",".join(METHODS)]
    same_library = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    program = subprocess.run(command, capture_output=True, text=True, timeout=300, env=same_library)
    assert program.returncode == -9, program.stderr[-2000:]
    left = json.loads((tmp_path / COMPARISON_FILE).read_text())
    assert [c["method"] for c in left["cells"]] == ["fp8", "fp8-unscaled"] and not left["complete"]

    measured: list[str] = []
    measure = CellBench.measure

    def noted(self: Any, cell: Any, progress: Any) -> dict[str, Any]:
        measured.append(cell.method)
        return measure(self, cell, progress)

    monkeypatch.setattr(CellBench, "measure", noted)
    options = CompressOptions(metric="weights", policy="uniform", recent=8, seq_len=256)
    document = compare(source, tmp_path, Request(METHODS, (0.5,), str(text_file), options, seq_len=256, max_windows=2))
    assert measured == ["kivi-4bit", "kivi-2bit"]
    assert document["cells"][:2] == left["cells"] and document["complete"]
    assert [p.name for p in tmp_path.iterdir()] == [COMPARISON_FILE]
