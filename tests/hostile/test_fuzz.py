"""A thousand cases of the fuzzer, the same each time; `python -m tests.hostile.fuzz` runs as many as it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_thousand_cases_succeed_or_are_refused_in_one_line() -> None:
    """In a process of its own, which forks: this one has threads of other tests."""
    command = [sys.executable, "-m", "tests.hostile.fuzz", "--cases", "1000", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1000 cases" in done.stdout and "'failed'" not in done.stdout
