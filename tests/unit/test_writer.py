"""The atomic writer: outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kvcompress.checkpoint import writer
from kvcompress.checkpoint.writer import atomic_directory, atomic_file, check_space, check_target, copy_checkpoint
from kvcompress.errors import CheckpointError, OutputError


def names(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*")}


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert scratch.parent == tmp_path  # the same file system, so that the last step is a rename
    assert names(tmp_path) == {"out", "out/a"}


def test_parents_are_made(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "b" / "out") as scratch:
        (scratch / "x").write_text("1")
    assert (tmp_path / "a" / "b" / "out" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        raise error
    assert names(tmp_path) == set()


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ValueError, match="x"), atomic_directory(tmp_path / "out", force=True):
        raise ValueError("x")
    assert names(tmp_path) == {"out", "out/old"}


def test_force_replaces_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_directory(tmp_path / "out", force=True) as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == {"out", "out/new"}


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == {"out", "out/new"}


def test_a_link_leads_to_where_the_output_lies(tmp_path: Path) -> None:
    """OUT may be a link to another disk: scratch and output lie there, and the link stays."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):  # also where there is an output to be replaced
        with atomic_directory(tmp_path / "out", force=True) as scratch:
            assert scratch.parent == tmp_path / "disk"
            (scratch / "new").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == {"disk", "disk/real", "disk/real/new", "out"}


def test_what_cannot_be_put_in_place_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".out") and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="broken"), atomic_directory(tmp_path / "out", force=True) as scratch:
        (scratch / "new").write_text("new")
    assert names(tmp_path) == {"out", "out/old"}


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_target(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="is not empty"):
        check_target(tmp_path, force=False)
    check_target(tmp_path, force=True)
    check_target(tmp_path / "new", force=False)


def test_a_target_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"), atomic_directory(tmp_path / "file" / "out"):
        pass
    assert names(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_target_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"), atomic_directory(tmp_path / "out"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match="no space left"), atomic_directory(tmp_path / "out") as scratch:
        (scratch / "a").write_text("1")
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_rights_are_explained(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutputError, match="no permission"), atomic_directory(tmp_path / "out"):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_file_system_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*out: odd\."), atomic_directory(tmp_path / "out"):
        raise OSError(errno.EIO, "odd")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """Those of dead processes and of this target only."""
    dead, alive = dead_pid(), os.getppid()
    for name in (f".out.partial-{dead}", f".out.partial-{dead}-old", f".out.partial-{alive}", f".other.partial-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    with atomic_directory(tmp_path / "out"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"out", f".out.partial-{alive}", f".other.partial-{dead}"}


def test_a_file_does_not_mind_what_a_dead_process_of_our_number_left(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("x")
    with atomic_file(tmp_path / "out") as scratch:
        scratch.write_text("x")
    assert names(tmp_path) == {"out"}


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "f") as scratch:
        scratch.write_text("1")
        (scratch.parent / ".tmp1").write_text("a library's own")
        assert not (tmp_path / "new" / "f").exists()
    assert names(tmp_path) == {"new", "new/f"}
    with pytest.raises(ValueError, match="x"), atomic_file(tmp_path / "new" / "f") as scratch:
        scratch.write_text("2")
        raise ValueError("x")
    assert (tmp_path / "new" / "f").read_text() == "1"
    assert names(tmp_path) == {"new", "new/f"}


def test_space_is_checked_where_the_target_will_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage._replace(free=1_000_000)

    monkeypatch.setattr(writer.shutil, "disk_usage", disk_usage)
    check_space(tmp_path / "a" / "b" / "out", 1_000_000)
    with pytest.raises(OutputError, match=r"no space left .* needs 1\.5 MB, 1\.0 MB are free"):
        check_space(tmp_path / "a" / "b" / "out", 1_500_000)
    assert asked == [tmp_path, tmp_path]


#: What belongs to a checkpoint, and what is a second copy of its weights or hidden.
KEPT = ("config.json", "model.safetensors", "model.safetensors.index.json", "sub/chat_template.jinja", "spiece.model")
KEPT += ("adapter_model.safetensors", "LICENSE")
LEFT_OUT = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "a.pth", ".git/config", ".hidden",
    "onnx/model.onnx", "onnx/config.json", "consolidated.safetensors", "consolidated.safetensors.index.json",
    "consolidated-00001-of-00002.safetensors", "original/consolidated.00.pth", "original/params.json",
    "metal/model.bin", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "skipped.txt",
)  # fmt: skip


def test_copies_leave_out_what_does_not_belong(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (*KEPT, *LEFT_OUT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    target.mkdir()
    copy_checkpoint(source, target, weights=frozenset({"model.safetensors"}), skip=frozenset({"skipped.txt"}))
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == set(KEPT)
    assert (target / "config.json").read_text() == "config.json"


@pytest.mark.parametrize("name", ["notes.txt", "more"])
def test_copies_do_not_follow_links_that_lead_out(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (source / name).symlink_to(tmp_path / "private" / ("key" if name == "notes.txt" else ""))
    if name == "more":  # rglob does not enter it in every version of Python
        copy_or_refuse(source, target)
    else:
        with pytest.raises(CheckpointError, match="outside of"):
            copy_checkpoint(source, target, weights=frozenset())
    assert not [p for p in target.rglob("*") if p.is_file()]


def copy_or_refuse(source: Path, target: Path) -> None:
    with suppress(CheckpointError):
        copy_checkpoint(source, target, weights=frozenset())


def test_copies_follow_the_links_of_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    (tmp_path / "target").mkdir()
    copy_checkpoint(tmp_path / "snapshot", tmp_path / "target", weights=frozenset({"model.safetensors"}))
    copied = tmp_path / "target" / "model.safetensors"
    assert copied.read_text() == "weights" and not copied.is_symlink()
