"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcompress.checkpoint.belonging import check_links, links_out
from kvcompress.errors import OutputError

#: Formats of weights: what is not loaded of them is a second copy of the weights.
_WEIGHT_SUFFIXES: tuple[str, ...] = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".onnx")
_WEIGHT_SUFFIXES += (
    ".onnx_data",
    ".msgpack",
    ".h5",
    ".ot",
    ".npz",
    ".npy",
    ".tflite",
    ".mlmodel",
    ".mlpackage",
    ".nemo",
    ".engine",
)
#: Files that are copied at once: one alone leaves memory and disk waiting.
_COPIES = 4
#: Linux' request to share blocks (XFS, Btrfs).
_FICLONE = 0x40049409
#: No copy of anything: what a PEFT adapter adds.
_ADAPTERS = frozenset({"adapter_model.safetensors"})


def check_target(target: Path, *, force: bool) -> None:
    """Raise OutputError if `target` cannot become the output directory."""
    if target.is_file():
        raise OutputError(f"{target} is a file; the output must be a directory that does not exist yet.")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(f"{target} is not empty. Choose another directory, or replace it with --force.")


def check_space(target: Path, n_bytes: int, advice: str = "Free some space, or write --maps-only.") -> None:
    """Raise OutputError if the file system that will hold `target` has less than n_bytes free."""
    parent = next(p for p in target.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        raise OutputError(
            f"no space left for {target}: it needs {n_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. {advice}"
        )


def is_full(error: BaseException) -> bool:
    """Return whether an error tells of a full disk: the system's own, or safetensors', with its text inside."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left", "StorageFull"))


@contextmanager
def explained_os_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a missing right into one clear OutputError."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise OutputError(f"no space left while writing {target}. Nothing was left behind.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"no permission to write {target} ({error.strerror}).") from error
        raise OutputError(f"cannot write {target}: {error.strerror or error}.") from error
    except Exception as error:
        if is_full(error):
            raise OutputError(f"no space left while writing {target}. Nothing was left behind.") from error
        raise


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it, where they are not there. Raises OutputError."""
    with explained_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def way_to(target: Path) -> Iterator[None]:
    """Make the directories above `target` for the block; those that it leaves empty go again: nothing was written."""
    made = [p for p in target.absolute().parents if not p.exists()]
    try:
        make_directory(target.parent)
        yield
    finally:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


@contextmanager
def atomic_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch directory beside `target` that becomes `target` when the block ends without an error.

    A link stays: what it leads to, which may be on another disk, is the target.
    """
    check_target(target, force=force)
    target = target.resolve() if target.is_symlink() else target
    with explained_os_errors(target), way_to(target), _scratch_directory(target) as scratch:
        yield scratch
        if target.exists():
            retired = scratch.with_name(f"{scratch.name}-old")
            target.rename(retired)
            try:
                scratch.rename(target)
            except OSError:
                retired.rename(target)
                raise
            shutil.rmtree(retired)
        else:
            scratch.rename(target)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path in a scratch directory beside `target` that becomes `target` when the block ends without an error.

    Libraries write scratch files of their own beside what they are asked to write: those go with the directory.
    """
    with explained_os_errors(target), _scratch_directory(target, exist_ok=True) as directory:
        yield directory / target.name
        (directory / target.name).rename(target)


@contextmanager
def _scratch_directory(target: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """Yield a directory beside `target`, which is gone when the block ends, unless it was renamed.

    exist_ok: whether it may be there, left by a dead process that had the number of this one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    scratch = target.parent / f".{target.name}.partial-{os.getpid()}"
    scratch.mkdir(exist_ok=exist_ok)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def copy_checkpoint(source: Path, target: Path, *, weights: frozenset[str], skip: frozenset[str] = frozenset()) -> None:
    """Copy a checkpoint's files, hidden ones and second copies of its weights left out.

    weights: the weight files that are loaded, which are copied. Every other file in a format of weights is a second
    copy (consolidated.safetensors, pytorch_model.bin, GGUF, Flax), as is every directory that holds one (original/,
    onnx/), and an index of such files. skip: other files that are left out. Raises CheckpointError for a symbolic link
    that leads out of the checkpoint, unless it is to weights: a stranger's link could name any file of this machine.
    """
    outside = {link.relative_to(source) for link in links_out(source)}
    copied = [f for f in _files(source) if str(f) not in skip and not _is_second_copy(f, source, weights)]
    for relative in copied:
        if str(relative) not in weights and not outside.isdisjoint([relative, *relative.parents]):
            check_links(source)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_COPIES) as pool:
        for _ in pool.map(_copy_file, [source / f for f in copied], [target / f for f in copied]):
            pass


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file; where the file system can, both share the blocks on disk until one of them is changed."""
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError), source.open("rb") as given, target.open("wb") as made:
            fcntl.ioctl(made, _FICLONE, given.fileno())
            return
    shutil.copyfile(source, target)


def _files(directory: Path) -> list[Path]:
    """Return the regular files below a directory, relative to it, without hidden ones."""
    found = (f.relative_to(directory) for f in sorted(directory.rglob("*")) if f.is_file())
    return [f for f in found if not any(part.startswith(".") for part in f.parts)]


def _is_second_copy(file: Path, source: Path, weights: frozenset[str]) -> bool:
    if str(file) in weights or file.name in _ADAPTERS:
        return False
    if file.name.endswith(".index.json"):
        return file.name != "model.safetensors.index.json"
    if file.suffix in _WEIGHT_SUFFIXES:
        return True
    beside = (source / file.parts[0]).rglob("*") if len(file.parts) > 1 else ()
    return any(f.suffix in _WEIGHT_SUFFIXES for f in beside)


def remove_stale(target: Path) -> None:
    """Remove what a killed process left beside `target`: scratch directories whose process is gone."""
    for left in target.parent.glob(f".{target.name}.partial-*"):
        match = re.search(r"\.partial-(\d+)", left.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
