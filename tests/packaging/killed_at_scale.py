"""Kill compress() with SIGKILL at random moments, resume it, often by other workers, and compare its plan.

    python tests/packaging/killed_at_scale.py MODEL TEXT WORK --way streamed --moments 20 --lanes 2
    python tests/packaging/killed_at_scale.py MODEL TEXT WORK --way shared --devices cuda:0,cuda:1 --lanes 4

Ways: streamed (layers from disk), shared (a process for each device), both (two processes that stream), ray (a cluster
that runs, RAY_ADDRESS or auto). Every run is a new process, as GPUs need it; it is ready when it and its workers have
their imports and their devices, and the clock of a moment begins then. Lanes work through moments side by side, each
after a run of its own that is left alone and tells how long one takes. Streaming wants a model that is larger than what
its least memory is; on a GPU that is one above 1 GB. Prints a line for each moment, and ends with 1 if a plan differs,
or if anything is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.numpy import load_file
from transformers.utils import logging

import kvcompress.calibration.measured
import kvcompress.runtime.value_fit_elsewhere  # noqa: F401 - with these, all that a run imports is there before its clock
from kvcompress.calibration import parts
from kvcompress.calibration.memory import least_of, whole_bytes
from kvcompress.calibration.processes import LocalWorkers
from kvcompress.calibration.ray_tasks import RayWorkers
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

# Sums are saved at most every second; with a clock that runs fast that is every few windows. Workers import this, too.
parts._SAVING_SHARE = 100.0
Make = Callable[[list[str]], Any]  # of devices


def on_ray(devices: list[str]) -> RayWorkers:
    return RayWorkers(os.environ.get("RAY_ADDRESS", "auto"), devices[0])


def alone(_: list[str]) -> None:
    return None


#: Way -> (workers of the run that is killed, of the one that resumes it; whether layers are streamed).
WAYS: dict[str, tuple[Make, Make, bool]] = {
    "streamed": (alone, alone, True),
    "shared": (LocalWorkers, lambda devices: LocalWorkers(devices[1:]), False),
    "both": (lambda devices: LocalWorkers(devices[:2]), alone, True),
    "ray": (on_ray, alone, False),
}


def run(arguments: argparse.Namespace) -> None:
    """Compress to the end, in this process and whatever workers it takes, once all are ready and a line comes."""
    first, then, streams = WAYS[arguments.way]
    devices = arguments.devices.split(",")
    workers = {"first": first, "then": then, "alone": alone}[arguments.by](devices)
    if workers is not None:
        list(workers.each(str, [()] * workers.n))
    if devices[0].startswith("cuda"):
        torch.cuda.set_device(devices[0])
        torch.zeros(1, device=devices[0])
    chosen = {"seq_len": arguments.seq_len, "tokens": arguments.windows * arguments.seq_len, "recent": 4, "keep": 0.25}
    options = CompressOptions(calibration=(str(arguments.text),), maps_only=True, **chosen)
    memory = between(arguments, devices[0]) if streams and arguments.by != "alone" else None
    how: dict[str, Any] = {"device": devices[0], "workers": workers, "memory": memory, "resume": arguments.resume}
    print("ready", flush=True)
    if not sys.stdin.readline():  # the one that was to send it is no more
        sys.exit(1)
    try:
        compress(arguments.model, arguments.out, options, **how)
    finally:
        if workers is not None:
            workers.close()


def between(arguments: argparse.Namespace, device: str) -> int:
    """Return a memory in which the model's layers are streamed."""
    with open_checkpoint(arguments.model) as checkpoint:
        size = (checkpoint.spec.dtype if device.startswith("cuda") else "float32", arguments.seq_len)
        least, whole = least_of(checkpoint, *size, device), whole_bytes(checkpoint, *size)
    assert least < whole, f"the model is too small to be streamed: {whole} bytes whole, {least} at least"
    return (least + whole) // 2


class Run:
    """A new process that compresses, once it is told to."""

    def __init__(self, arguments: argparse.Namespace, lane: int, out: Path, by: str, *, resume: bool = False) -> None:
        given, devices = vars(arguments), arguments.devices.split(",")
        devices = devices[lane % len(devices) :] + devices[: lane % len(devices)]
        command = [sys.executable, __file__, arguments.model, arguments.text, arguments.work, "--by", by, "--out", out]
        command += [part for name in ("way", "windows", "seq_len") for part in (f"--{name}", given[name])]
        command += ["--devices", ",".join(devices), *(["--resume"] if resume else [])]
        self.out = out
        self._process = subprocess.Popen(map(str, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self) -> None:
        """Begin, when it is ready."""
        assert self._process.stdin and self._process.stdout
        if not any(line == "ready\n" for line in self._process.stdout):
            raise RuntimeError(f"a run for {self.out} ended with {self._process.wait()} before it was ready")
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def ended(self) -> int:
        return self._process.wait()

    def killed(self, after: float = 0.0) -> int:
        """Kill it after so many seconds, where it has not ended by then."""
        try:
            return self._process.wait(after)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            return self.ended()

    def whole(self) -> float:
        """Run to the end and return the seconds that took."""
        self.go()
        begun = time.monotonic()
        assert self.ended() == 0, f"the run for {self.out} failed"
        return time.monotonic() - begun


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


def moment(begin: Callable[..., Run], out: Path, unbroken: Path, at: float) -> tuple[float | None, bool, str]:
    """Kill a run after so many seconds and resume it; return (seconds if it had ended, whether all is well, a line)."""
    out.parent.mkdir()
    broken, resumed = begin(out, "first"), begin(out, "then", resume=True)
    broken.go()
    begun = time.monotonic()
    code, took, left = broken.killed(at), time.monotonic() - begun, what_is_left(out.parent)
    if out.exists():
        resumed.killed()
    else:
        resumed.whole()
    equal, away = same(out, unbroken)
    names = sorted(p.name for p in out.parent.iterdir() if p.suffix != ".safetensors")
    told = {0: "had ended", -signal.SIGKILL: f"killed after {at:5.2f} s"}.get(code, f"FAILED with {code}")
    told += f", left {left}: bits {'equal' if equal else 'DIFFER'}, maps within {away:.0e}"
    told += "" if names == ["out"] else f", NOT TIDY: {names}"
    shutil.rmtree(out.parent)
    return None if code else took, equal and names == ["out"] and away < 1e-3 and code in (0, -signal.SIGKILL), told


def lane(arguments: argparse.Namespace, index: int, reference: Future[Path]) -> list[tuple[bool, bool]]:
    """Work through every moment of a lane; return of each whether it was killed and whether all is well."""
    begin, work = partial(Run, arguments, index), arguments.work / arguments.way / str(index)
    work.mkdir(parents=True)
    timed = work / "timed" / "out"
    timed.parent.mkdir()
    length, rng = begin(timed, "first").whole(), random.Random(1000 * arguments.seed + index)
    unbroken = reference.result()
    equal, away = same(timed, unbroken)
    told = f"{length:.1f} s unbroken, bits {'equal' if equal else 'DIFFER'}, maps within {away:.0e}"
    print(f"lane {index}: {told}", flush=True)
    found = []
    for number in range(index, arguments.moments, arguments.lanes):
        took, good, told = moment(begin, work / f"{number:02d}" / "out", timed, rng.uniform(0, length))
        print(f"{number + 1:2d}: {told}", flush=True)
        found.append((took is None, good and equal))
        length = min(length, took or length)  # the machine may have become faster
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--devices", default="cpu,cpu,cpu,cpu")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--seq_len", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    for hidden in ("--by", "--out"):  # of a run
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.by:
        run(arguments)
        return
    shutil.rmtree(arguments.work / arguments.way, ignore_errors=True)
    unbroken = arguments.work / arguments.way / "unbroken" / "out"
    unbroken.parent.mkdir(parents=True)

    def reference() -> Path:
        Run(arguments, 0, unbroken, "alone").whole()
        return unbroken

    with ThreadPoolExecutor(arguments.lanes + 1) as pool:
        made = pool.submit(reference)
        lanes = [pool.submit(lane, arguments, index, made) for index in range(arguments.lanes)]
        found = [one for done in lanes for one in done.result()]
    good, killed = (sum(one[i] for one in found) for i in (1, 0))
    print(f"{arguments.way}: {good} of {len(found)} as unbroken, {killed} killed", flush=True)
    sys.exit(good < len(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    main()
