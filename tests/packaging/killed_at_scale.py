"""Kill compress() with SIGKILL at random moments, resume it, often by other workers, and compare its plan.

    python tests/packaging/killed_at_scale.py MODEL TEXT WORK --way streamed --moments 20

Ways: streamed (layers from disk), shared (four processes), both (two processes that stream), ray (a cluster that runs,
RAY_ADDRESS or auto). A small model on the CPU; --devices has a process each for shared and both. Prints a line for each
moment, and ends with 1 if a plan differs, or if anything is left behind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.numpy import load_file
from transformers.utils import logging

from kvcompress.calibration import parts
from kvcompress.calibration.memory import least_bytes
from kvcompress.calibration.processes import LocalWorkers
from kvcompress.calibration.ray_tasks import RayWorkers
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

SEQ_LEN = 32
Make = Callable[[list[str]], Any]  # of devices
#: Way -> (workers of the run that is killed, of the one that resumes it; whether layers are streamed).
WAYS: dict[str, tuple[Make, Make, bool]] = {
    "streamed": (lambda _: None, lambda _: None, True),
    "shared": (LocalWorkers, lambda devices: LocalWorkers(devices[1:]), False),
    "both": (lambda devices: LocalWorkers(devices[:2]), lambda _: None, True),
    "ray": (
        lambda devices: RayWorkers(os.environ.get("RAY_ADDRESS", "auto"), devices[0]),
        lambda _: None,
        False,
    ),
}


def run(arguments: argparse.Namespace, out: Path, make: Make, *, memory: int | None, resume: bool) -> None:
    """Compress to the end, in this process, and whatever workers it takes."""
    # Sums are saved at most every second; with a clock that runs fast that is every few windows.
    parts._SAVING_SHARE = 100.0
    chosen = {"seq_len": SEQ_LEN, "tokens": arguments.windows * SEQ_LEN, "recent": 4, "keep": 0.25}
    options = CompressOptions(calibration=(str(arguments.text),), maps_only=True, **chosen)
    workers = make(arguments.devices.split(","))
    device = arguments.devices.split(":")[0].split(",")[0]
    try:
        compress(arguments.model, out, options, device=device, workers=workers, memory=memory, resume=resume)
    finally:
        if workers is not None:
            workers.close()


def forked(work: Callable[[], None]) -> int:
    """Return the process that does some work: a fork of this one, which has imported everything and begun nothing."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def what_is_left(directory: Path) -> str:
    names = [p.name for p in directory.rglob("*") if p.is_file()]
    counts = {what: sum(n.startswith(what) for n in names) for what in ("windows-", "inputs-", "sums-")}
    whole = ", all moments" if list(directory.glob("*.safetensors")) else ""
    return f"{counts['windows-']} parts, {counts['inputs-']} inputs and {counts['sums-']} sums of layers{whole}"


def same(out: Path, unbroken: Path) -> tuple[bool, float]:
    """Return whether bits are equal, and by how much maps differ at most, as a share of the largest number."""
    ours, theirs = (json.loads((o / "kv_plan.json").read_text())["sites"] for o in (out, unbroken))
    a, b = (load_file(o / "kv_maps.safetensors") for o in (out, unbroken))
    if [site["bits"] for site in ours] != [site["bits"] for site in theirs] or a.keys() != b.keys():
        return False, float("inf")
    away = 0.0
    for name, tensor in a.items():
        x, y = tensor.astype(numpy.float64), b[name].astype(numpy.float64)
        away = max(away, float(abs(x - y).max(initial=0) / max(abs(y).max(initial=0), 1e-30)))
    return True, away


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--devices", default="cpu,cpu,cpu,cpu")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    begin_with_fork()
    first, then, streams = WAYS[arguments.way]
    memory = None
    if streams:
        with open_checkpoint(arguments.model) as checkpoint:
            memory = least_bytes(checkpoint, "float32", SEQ_LEN)
    work = arguments.work / arguments.way
    shutil.rmtree(work, ignore_errors=True)
    for name in ("unbroken", "timed"):
        (work / name).mkdir(parents=True)
    unbroken = work / "unbroken" / "out"
    assert ended(forked(lambda: run(arguments, unbroken, lambda _: None, memory=None, resume=False))) == 0
    begun = time.monotonic()
    assert ended(forked(lambda: run(arguments, work / "timed" / "out", first, memory=memory, resume=False))) == 0
    length, rng = time.monotonic() - begun, random.Random(arguments.seed)
    good = [same(work / "timed" / "out", unbroken)[0]]
    print(f"{arguments.way}: {length:.1f} s unbroken, plan {'equal' if good[0] else 'DIFFERENT'}", flush=True)
    for index in range(arguments.moments):
        out, moment = work / f"{index:02d}" / "out", rng.uniform(0, length)
        out.parent.mkdir()
        pid = forked(lambda out=out: run(arguments, out, first, memory=memory, resume=False))
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        code, left = ended(pid), what_is_left(out.parent)
        if not out.exists():
            assert ended(forked(lambda out=out: run(arguments, out, then, memory=memory, resume=True))) == 0
        equal, away = same(out, unbroken)
        tidy = sorted(p.name for p in out.parent.iterdir() if p.suffix != ".safetensors") == ["out"]
        good.append(equal and tidy and away < 1e-3)
        told = f"{index + 1:2d}: " + (f"killed after {moment:5.2f} s" if code else "had ended")
        print(f"{told}, left {left}: bits {'equal' if equal else 'DIFFER'}, maps within {away:.0e}", end="")
        print("" if tidy else f", NOT TIDY: {sorted(p.name for p in out.parent.iterdir())}", flush=True)
    print(f"{arguments.way}: {sum(good[1:])} of {arguments.moments} as unbroken", flush=True)
    sys.exit(not all(good))


def begin_with_fork() -> None:
    """Let workers be forks, too: they begin at once, and may, since nothing of this process has used a GPU yet."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking whether there is one uses it
    own = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: own("fork")  # type: ignore[assignment]


if __name__ == "__main__":
    main()
