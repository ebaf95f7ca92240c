"""`kill -9` at any point of compress(): no output directory, and a resumed run that ends as an unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.packaging import killed_runs
from tests.packaging.killed_runs import KILLS, N_WINDOWS, RANDOM

SIGKILL = -9


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened to every killed run, and to the unbroken one."""
    arguments = [tiny_checkpoint("llama-gqa", num_hidden_layers=2), text_file, tmp_path_factory.mktemp("killed")]
    command = [sys.executable, killed_runs.__file__, *map(str, arguments)]
    same_library = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=same_library)
    assert program.returncode == 0, program.stderr[-2000:]
    return json.loads(program.stdout.splitlines()[-1])


def moments_files(names: list[str]) -> list[str]:
    return [n for n in names if n.startswith("kvcompress-moments-")]


def test_the_unbroken_run(runs: dict[str, Any]) -> None:
    assert runs["unbroken"]["code"] == 0
    assert runs["unbroken"]["files"] == [*moments_files(runs["unbroken"]["files"]), "out"]


@pytest.mark.parametrize("name", [*KILLS, *RANDOM])
def test_killed_and_resumed(runs: dict[str, Any], name: str) -> None:
    run, unbroken = runs[name], runs["unbroken"]
    assert run["killed"] == SIGKILL or name in RANDOM  # which may come too late
    assert ("out" in run["left"]) == (run["killed"] == 0)
    assert run["resumed"] == 0
    assert run["files"] == unbroken["files"]  # the output, its moments, no scratch of the dead process
    assert run["digests"] == unbroken["digests"]


def test_random_kills_hit(runs: dict[str, Any]) -> None:
    """Some do on any machine: their moments are shares of the unbroken run's time; a later run may be much quicker."""
    assert any(runs[name]["killed"] == SIGKILL for name in RANDOM)


def test_resuming_continues_where_the_sums_were_saved(runs: dict[str, Any]) -> None:
    """Not from the beginning, and not again once the moments are whole."""
    assert runs["first window"]["windows"] >= N_WINDOWS - 1
    assert any("partial" in name for name in moments_files(runs["middle window"]["left"]))
    assert N_WINDOWS // 2 <= runs["middle window"]["windows"] < N_WINDOWS
    assert 0 <= runs["last window"]["windows"] < N_WINDOWS // 2
    for name in ("fit", "write", "weights copied", "maps written", "before the last rename"):
        assert runs[name]["windows"] == 0
        assert len(moments_files(runs[name]["left"])) == 1


def test_a_kill_while_writing_leaves_only_a_hidden_scratch(runs: dict[str, Any]) -> None:
    for name in ("weights copied", "maps written", "before the last rename"):
        scratch = [n for n in runs[name]["left"] if n.startswith(".out.partial-")]
        assert len(scratch) == 1
        assert set(runs[name]["left"]) == {*scratch, *moments_files(runs[name]["left"])}
