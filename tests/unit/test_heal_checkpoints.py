"""Checkpoints of a training on a disk that is full, and those that a killed process left half written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvcompress.errors import OutputError
from kvcompress.heal.checkpoints import explained_disk, last_checkpoint

WHOLE = '{"best_metric": 0.5, "global_step": 3, "log_history": []}'


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("basic_ios::clear: iostream error")],
    ids=["system", "torch"],
)
def test_a_full_disk_is_said_with_what_to_do(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no space left .* --resume"), explained_disk(tmp_path):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), RuntimeError("a bug")], ids=["file", "bug"])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, explained_disk(tmp_path):
        raise error
    assert raised.value is error


def test_the_last_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None and last_checkpoint(tmp_path) is None
    for step, state in {9: WHOLE, 10: WHOLE, 11: WHOLE[:20], 12: None}.items():
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if state is not None:
            (directory / "trainer_state.json").write_text(state, encoding="utf-8")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
