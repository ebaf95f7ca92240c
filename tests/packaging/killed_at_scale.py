"""Kill compress() with SIGKILL at random moments, resume it, often by other workers, and compare its plan.

    python tests/packaging/killed_at_scale.py MODEL TEXT WORK --way streamed --moments 20 --lanes 2
    python tests/packaging/killed_at_scale.py MODEL TEXT WORK --way shared --devices cuda:0,cuda:1 --lanes 4

Ways: streamed (layers from disk), shared (a process for each device), both (two processes that stream), ray (a cluster
that runs: RAY_ADDRESS, by commas one for each lane, or auto). Every run is a fork of a process that has all imports and
no GPU; it is ready when it and its workers have their devices, and the clock of a moment begins then. Lanes work
through moments side by side, each after a run of its own that is left alone and tells how long one takes; the processes
of its next moment start while one is under way. Streaming wants a model that is larger than what its least memory is;
on a GPU that is one above 2.2 GB. Prints a line for each moment, and ends with 1 if a plan differs, or if anything is
left behind. A run that hangs says where, and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else asking whether there is a GPU uses it, which no fork may then

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
#: Whose processes are forks of one that has imported what a run takes, and done nothing else.
FORKS = multiprocessing.get_context("forkserver")


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


def run(arguments: argparse.Namespace, told: Connection) -> None:
    """Compress to the end, in this process and whatever workers it takes, once all are ready and a word comes."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    first, then, streams = WAYS[arguments.way]
    devices = arguments.devices.split(",")
    clusters = os.environ.get("RAY_ADDRESS", "auto").split(",")
    os.environ["RAY_ADDRESS"] = clusters[arguments.lane % len(clusters)]
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
    told.send("ready")
    told.recv()  # raises where the one that was to send it is no more
    faulthandler.dump_traceback_later(arguments.patience, exit=True)
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
        devices = arguments.devices.split(",")
        devices = devices[lane % len(devices) :] + devices[: lane % len(devices)]
        given = {"by": by, "out": out, "resume": resume, "lane": lane, "devices": ",".join(devices)}
        self.out = out
        self._told, theirs = FORKS.Pipe()
        self._process = FORKS.Process(target=run, args=(argparse.Namespace(**vars(arguments) | given), theirs))
        self._process.start()
        theirs.close()

    def go(self) -> None:
        """Begin, when it is ready."""
        try:
            self._told.recv()
        except EOFError as error:
            raise RuntimeError(f"a run for {self.out} ended with {self.ended()} before it was ready") from error
        self._told.send("go")

    def ended(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def killed(self, after: float = 0.0) -> int:
        """Kill it after so many seconds, where it has not ended by then."""
        self._process.join(after)
        self._process.kill()
        return self.ended()

    def whole(self) -> float:
        """Run to the end and return the seconds that took."""
        self.go()
        begun = time.monotonic()
        assert self.ended() == 0, f"the run for {self.out} failed"
        return time.monotonic() - begun


def what_is_left(directory: Path) -> str:
    """Say what a run has left of a calibration; nothing where there is nothing to go on from."""
    names = [p.name for p in directory.rglob("*") if p.is_file()]
    kinds = {"windows-": "parts", "inputs-": "inputs of layers", "sums-": "sums of layers"}
    counts = {told: sum(n.startswith(begin) for n in names) for begin, told in kinds.items()}
    left = [f"{n} {told}" for told, n in counts.items() if n]
    return " and ".join([*left, "all moments"] if list(directory.glob("*.safetensors")) else left)


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


class Moments:
    """The moments that are left, for all lanes; none when the seconds are over."""

    def __init__(self, n: int, seconds: float) -> None:
        self._left, self._end = iter(range(n)), time.monotonic() + seconds

    @property
    def are_over(self) -> bool:
        return time.monotonic() > self._end

    def taken(self) -> int | None:
        return None if self.are_over else next(self._left, None)


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a moment. took: seconds to the end of a run that was not killed in time; left: see what_is_left."""

    took: float | None
    left: str
    good: bool


def moment(broken: Run, resumed: Run, unbroken: list[Path], at: float) -> tuple[Found, str]:
    """Kill a run after so many seconds and resume it; return what came of it, with a line that tells it."""
    out = broken.out
    broken.go()
    begun = time.monotonic()
    code, took, left = broken.killed(at), time.monotonic() - begun, what_is_left(out.parent)
    if out.exists():
        resumed.killed()
    else:
        resumed.whole()
    equal, away = min((same(out, one) for one in unbroken), key=lambda found: found[1])
    names = sorted(p.name for p in out.parent.iterdir() if p.suffix != ".safetensors")
    told = {0: "had ended", -signal.SIGKILL: f"killed after {at:5.2f} s"}.get(code, f"FAILED with {code}")
    told += f", left {left or 'nothing'}: bits {'equal' if equal else 'DIFFER'}, maps within {away:.0e}"
    told += "" if names == ["out"] else f", NOT TIDY: {names}"
    shutil.rmtree(out.parent)
    good = equal and names == ["out"] and away < 1e-3 and code in (0, -signal.SIGKILL)
    return Found(None if code else took, left, good), told


def lane(arguments: argparse.Namespace, index: int, reference: Future[Path], moments: Moments) -> list[Found]:
    """Take moments until none is left. A plan is to be that of the same workers left alone, or of one process."""
    begin, work = partial(Run, arguments, index), arguments.work / arguments.way / str(index)

    def started() -> tuple[int, Run, Run] | None:
        """Start the processes of the next moment, and do not wait for them."""
        if (number := moments.taken()) is None:
            return None
        out = work / f"{number:02d}" / "out"
        out.parent.mkdir()
        return number, begin(out, "first"), begin(out, "then", resume=True)

    timed = work / "timed" / "out"
    timed.parent.mkdir(parents=True)
    whole = begin(timed, "first")
    overlaps = arguments.way != "ray"  # whose cluster's GPUs would be taken by workers that only start
    ahead = started() if overlaps else None
    length, rng = whole.whole(), random.Random(1000 * arguments.seed + index)
    equal, away = same(timed, reference.result())
    told = f"{length:.1f} s unbroken, bits {'equal' if equal else 'DIFFER'}, maps within {away:.0e}"
    print(f"lane {index}: {told}", flush=True)
    found = []
    while not moments.are_over and (now := ahead or started()):
        (number, broken, resumed), ahead = now, started() if overlaps else None
        one, told = moment(broken, resumed, [timed, reference.result()], rng.uniform(0, length))
        print(f"{number + 1:2d}: {told}", flush=True)
        found.append(Found(one.took, one.left, one.good and equal))
        length = min(length, one.took or length)  # the machine may have become faster
    for run in ahead[1:] if ahead else ():
        run.killed()
    return found


def arguments_given() -> argparse.Namespace:
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
    parser.add_argument("--seconds", type=float, default=1e9, help="No new moment after them.")
    parser.add_argument("--patience", type=float, default=300.0, help="Seconds after which a run is said to hang.")
    parser.add_argument("--waits", action="store_true", help="Begin when a line comes.")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_given()
    forkserver.ensure_running()
    if arguments.waits and not sys.stdin.readline():  # the one that was to send it is no more
        sys.exit(1)
    shutil.rmtree(arguments.work / arguments.way, ignore_errors=True)
    unbroken = arguments.work / arguments.way / "unbroken" / "out"
    unbroken.parent.mkdir(parents=True)

    def reference() -> Path:
        Run(arguments, 0, unbroken, "alone").whole()
        return unbroken

    moments = Moments(arguments.moments, arguments.seconds)
    with ThreadPoolExecutor(arguments.lanes + 1) as pool:
        made = pool.submit(reference)
        lanes = [pool.submit(lane, arguments, index, made, moments) for index in range(arguments.lanes)]
        found = [one for done in lanes for one in done.result()]
    killed = [one for one in found if one.took is None]
    good, left = sum(one.good for one in found), sum(bool(one.left) for one in killed)
    print(f"{arguments.way}: {good} of {len(found)} as unbroken, {len(killed)} killed, {left} went on", flush=True)
    sys.exit(good < len(found))


if __name__ == "__main__":
    FORKS.set_forkserver_preload(["numpy", *(name for name in sys.modules if name.startswith("kvcompress"))])
    main()
