"""Run compress() in child processes that are killed with SIGKILL, then resumed; print what was found as JSON.

    python killed_runs.py SOURCE TEXT WORK

A program of its own, because forking is only safe before torch has started threads: everything is imported once,
and each run is a fork of that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers.utils import logging

import kvcompress.calibration.parts as parts
import kvcompress.pipeline as pipeline
from kvcompress.calibration.fisher import Summing
from kvcompress.options import CompressOptions

N_WINDOWS, SEQ_LEN = 12, 32
_RESULTS = ("kv_plan.json", "kv_maps.safetensors", "model.safetensors")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_progress(stage: str, done: int) -> Callable[[str, int, int], None]:
    """Return a progress callback that dies at a step."""
    return lambda s, d, _: die() if (s, d) == (stage, done) else None


def after(module: Any, name: str) -> None:
    """Let a function of a module do its work and then die."""
    original = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        die()

    setattr(module, name, call)


def at_rename(prefix: str) -> None:
    """Die where a scratch file or directory of that name would be put in its place."""
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if any(part.startswith(prefix) for part in self.parts[-2:]):
            die()
        return original(self, target)

    Path.rename = rename  # type: ignore[method-assign, assignment]


def in_library() -> None:
    """Die in safetensors, which writes to a file of its own beside the one it is asked for and renames that."""

    def save_file(tensors: Any, file: Path, metadata: Any = None) -> None:
        (Path(file).parent / ".tmpABCDEF").write_bytes(b"half of them")
        die()

    safetensors.torch.save_file = save_file


def tokens(n_windows: int) -> int:
    return n_windows * SEQ_LEN


#: Name -> what to do in the child before compress(); returns the progress callback or None.
KILLS: dict[str, Callable[[], Any]] = {
    "first window": lambda: at_progress("calibrate", tokens(1)),
    "middle window": lambda: at_progress("calibrate", tokens(N_WINDOWS // 2)),
    "last window": lambda: at_progress("calibrate", tokens(N_WINDOWS)),
    "while the sums are saved": lambda: at_rename(".windows-000000"),
    "while all sums are saved": lambda: at_rename(".kvcompress-moments-"),
    "in the library that saves them": in_library,
    "fit": lambda: at_progress("fit", 2),
    "write": lambda: at_progress("write", 0),
    "weights copied": lambda: after(pipeline, "copy_checkpoint"),
    "maps written": lambda: after(pipeline, "save_maps"),
    "before the last rename": lambda: at_rename(".out.partial-"),
}
#: Runs that are killed from outside after a random time.
RANDOM = tuple(f"random time {i}" for i in range(3))


def fork(run: Callable[[], None], kill_after: float | None = None) -> int:
    """Return the exit code of `run` in a child process, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(source: Path, text: Path, work: Path) -> dict[str, Any]:
    parts._SAVING_SHARE = math.inf  # the sums are saved after every window, however busy the machine

    def run(directory: Path, *, resume: bool = False, kill: Callable[[], Any] | None = None) -> Callable[[], None]:
        def child() -> None:
            progress = kill() if kill else None
            if resume:
                add = Summing.add

                def counted(*args: Any, **kwargs: Any) -> None:
                    with (directory.parent / f"{directory.name}.windows").open("a") as log:
                        log.write("x")
                    add(*args, **kwargs)

                Summing.add = counted  # type: ignore[method-assign]
            options = CompressOptions(calibration=(str(text),), tokens=tokens(N_WINDOWS), seq_len=SEQ_LEN, recent=4)
            pipeline.compress(source, directory / "out", options, device="cpu", resume=resume, progress=progress)

        return child

    def digests(directory: Path) -> dict[str, str]:
        return {n: hashlib.sha256((directory / "out" / n).read_bytes()).hexdigest() for n in _RESULTS}

    def names(directory: Path) -> list[str]:
        return sorted(p.name for p in directory.iterdir())

    (work / "unbroken").mkdir()
    started = time.monotonic()
    code = fork(run(work / "unbroken"))
    seconds = time.monotonic() - started
    runs = {"unbroken": {"code": code, "files": names(work / "unbroken"), "digests": digests(work / "unbroken")}}
    rng = random.Random(0)
    times = {name: rng.uniform(0.02, 0.9) * seconds for name in RANDOM}
    for name in [*KILLS, *times]:
        directory = work / name.replace(" ", "-")
        directory.mkdir()
        killed = fork(run(directory, kill=KILLS.get(name)), times.get(name))
        left = names(directory)
        resumed = fork(run(directory, resume=True)) if killed else 0
        log = work / f"{directory.name}.windows"
        runs[name] = {
            "killed": killed,
            "left": left,
            "resumed": resumed,
            "windows": len(log.read_text()) if log.exists() else 0,
            "files": names(directory),
            "digests": digests(directory) if (directory / "out").is_dir() else {},
        }
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print(json.dumps(main(*map(Path, sys.argv[1:4]))))
