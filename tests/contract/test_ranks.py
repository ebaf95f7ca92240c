"""`torchrun ... kvcompress compress`: one rank leads, the others do what it hands out; the plan is one process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE

_COMMAND = "from kvcompress_cli.app import main; main()"


def test_two_ranks(tiny_checkpoint: Any, text_file: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama-gqa")
    program = tmp_path / "command.py"
    program.write_text(_COMMAND)
    (tmp_path / "ranks").mkdir()
    asked = ["--calibration", str(text_file), "--tokens", "256", "--seq-len", "32", "--recent", "4", "--keep", "0.25"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", program]
    same_library = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*map(str, command), "compress", str(source), str(tmp_path / "ranks" / "out"), *asked, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env=same_library,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("wrote ") == 1
    options = CompressOptions(calibration=(str(text_file),), tokens=256, seq_len=32, recent=4, keep=0.25)
    compress(source, tmp_path / "alone", options, device="cpu")
    ranks, alone = (json.loads((d / PLAN_FILE).read_text()) for d in (tmp_path / "ranks" / "out", tmp_path / "alone"))
    for site, other in zip(ranks["sites"], alone["sites"], strict=True):
        assert site["bits"] == other["bits"]
        assert site["predicted_loss"] == pytest.approx(other["predicted_loss"], rel=1e-6)
