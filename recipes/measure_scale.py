"""Time and memory of a calibration against the size of a model: whole, streamed, on several GPUs, over Ray.

    python recipes/measure_scale.py measure WORK --tokenizer DIR --text FILE --sizes 0.1b,1b,8b --ways whole,6GB,gpus
    python recipes/draw_scale.py WORK/scale.json --out docs

Models have the shapes of scale_models.py and random weights, made in WORK; a checkpoint that lies there is a size, too,
by its name. A way is `whole` (one device), `gpus` (all of this host), `ray` (the cluster at hand) or a size of memory,
`least` for the smallest that the command takes. Each measurement is a process of its own that runs
`kvcompress.compress` with --maps-only; its plan is compared with those of other ways. With --calibration-only it ends
with the moments. A process has its imports done while the one before it measures.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from scale_models import SHAPES, make

from kvcompress.calibration.memory import least_of, parse_bytes, whole_bytes
from kvcompress.checkpoint.reader import open_checkpoint

#: Ways with other processes than one.
SHARED = ("gpus", "ray")


class Stages:
    """When each stage of a run told first and last, in seconds, and how much was done then."""

    def __init__(self) -> None:
        self.started, self.told = time.monotonic(), dict[str, list[tuple[float, int]]]()
        self._tenths, self.last = dict[str, int](), "begin"

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, self.last = (round(time.monotonic() - self.started, 2), done), stage
        self.told.setdefault(stage, [now, now])[1] = now
        tenth = 10 * done // max(total, 1)
        if self._tenths.get(stage) != tenth:
            self._tenths[stage] = tenth
            print(f"{stage}: {done} of {total} after {now[0]} s", file=sys.stderr, flush=True)

    def rate(self, stage: str) -> float:
        """Return what was done in a second, between the first word and the last."""
        (begin, before), (end, after) = self.told[stage]
        return (after - before) / max(end - begin, 1e-9)


class Outside(threading.Thread):
    """What others see of this process while it runs: its memory, and all that its first GPU holds (nvidia-smi).

    Of that, `beside` is what torch's allocator of this process does not hold. Each stage's most is told at its end.
    """

    def __init__(self, device: str, stages: Stages) -> None:
        super().__init__(daemon=True)
        self._on_gpu, self._stages, self.resident, self.n_looks = device == "cuda", stages, 0, 0
        self.gpu, self.beside = dict[str, int](), dict[str, int]()  # the most in each stage

    def run(self) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        ask = ["nvidia-smi", "-i", visible, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        if not self._on_gpu:
            while True:
                self._look()
                time.sleep(0.25)
        with subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) as told:
            assert told.stdout is not None
            atexit.register(told.kill)
            before = 0
            for line in told.stdout:
                self._look()
                stage = self._stages.last if self.n_looks else "before"
                held = torch.cuda.memory_reserved()
                beside = (int(line) << 20) - max(held, before)  # torch may have given some back since nvidia-smi looked
                before = held
                if stage not in self.gpu and self.gpu:
                    self._tell(next(reversed(self.gpu)))
                for most, now in ((self.gpu, int(line) << 20), (self.beside, max(0, beside))):
                    most[stage] = max(most.get(stage, 0), now)
                self.n_looks += 1

    def _tell(self, stage: str) -> None:
        told = f"{self.gpu[stage] / 1e9:.2f} GB of the GPU, {self.beside[stage] / 1e9:.2f} beside the allocator"
        print(f"{stage}: at most {told}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        import psutil

        self.resident = max(self.resident, psutil.Process().memory_info().rss)


def measured(model: Path, out: Path, args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Return what compressing took, in this process."""
    from kvcompress.calibration.calibrate import obtain_moments
    from kvcompress.options import CompressOptions
    from kvcompress.pipeline import compress
    from kvcompress.runtime import value_fit_elsewhere  # noqa: F401 - and all else that a run imports

    device, workers = args.device, workers_of(way, args.device)
    if args.waits:
        if workers is not None:  # theirs, too
            list(workers.each(str, [()] * workers.n))
        if not sys.stdin.readline():  # the one that was to send it is no more
            sys.exit(1)
    with open_checkpoint(model) as checkpoint:
        size = (checkpoint.spec.dtype if device == "cuda" else "float32", args.seq_len)
        least = least_of(checkpoint, *size, device)
        numbers = sum(entry.n_numbers for entry in checkpoint.tensors.values())
        counted = {"whole_bytes": whole_bytes(checkpoint, *size), "least_bytes": least}
    memory = None if way in ("whole", *SHARED) else least if way == "least" else parse_bytes(way)
    options = CompressOptions(
        calibration=(str(args.text),), tokens=args.tokens, seq_len=args.seq_len, recent=args.recent, maps_only=True
    )
    stages = Stages()
    outside = Outside(device, stages)
    outside.start()
    how: dict[str, Any] = {"device": device, "workers": workers, "memory": memory, "progress": stages}
    if args.calibration_only:
        with open_checkpoint(model) as checkpoint:
            obtain_moments(checkpoint, out, options, **how)
    else:
        compress(model, out, options, **how)
    found = {
        "parameters": numbers,
        "way": way,
        "streamed": "layers" in stages.told,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tokens": args.tokens,
        "seconds": round(time.monotonic() - stages.started, 2),
        "calibration_seconds": stages.told["coherence"][1][0],
        "tokens_a_second": round(stages.rate("calibrate")),
        "stages": stages.told,
        "resident_bytes": outside.resident,
        **counted,
    }
    if device == "cuda":
        found |= {"allocated_bytes": torch.cuda.max_memory_allocated()}
        found |= {"reserved_bytes": torch.cuda.max_memory_reserved()}
        found |= {"gpu_bytes": max(outside.gpu.values()), "gpu_bytes_in": outside.gpu, "looks": outside.n_looks}
        found |= {"beside_allocator_bytes_in": outside.beside}
    if workers is not None:
        workers.close()
    return found | (read(model, size[0], device) if found["streamed"] else {})


def workers_of(way: str, device: str) -> Any:
    """Return who calibrates: None for this process alone."""
    from kvcompress.calibration.processes import LocalWorkers, workers_on_gpus
    from kvcompress.calibration.ray_tasks import RayWorkers

    if way == "ray":
        return RayWorkers(os.environ.get("RAY_ADDRESS", "auto"), device)
    if way == "gpus":
        return workers_on_gpus("all") if device == "cuda" else LocalWorkers(("cpu", "cpu"))
    return None


def read(model: Path, dtype: str, device: str) -> dict[str, Any]:
    """Return how the layers of a streamed model were read, and how long all of them take with nothing beside."""
    from kvcompress.calibration.worker import streamed_model

    streamed = streamed_model(str(model.absolute()), dtype, device)
    reading = streamed.reading
    found = {"read_bytes": reading.n_bytes, "read_seconds": reading.seconds, "waited_seconds": reading.waited}
    begun = time.monotonic()
    for _ in streamed.in_order(range(len(streamed.layers))):
        pass
    return found | {"layer_bytes": streamed.layer_bytes, "reading_alone_seconds": time.monotonic() - begun}


def same_plan(out: Path, whole: Path) -> dict[str, Any]:
    """Return whether bits are equal, and by how much maps differ at most, as a share of the largest number."""
    from safetensors.torch import load_file

    ours, theirs = (json.loads((o / "kv_plan.json").read_text(encoding="utf-8"))["sites"] for o in (out, whole))
    a, b = (load_file(o / "kv_maps.safetensors") for o in (out, whole))
    if [s["bits"] for s in ours] != [s["bits"] for s in theirs]:
        return {"bits_equal": False}
    away = max(
        float((t.double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp_min(1e-30))
        for n, t in a.items()
    )
    return {"bits_equal": True, "maps_within": away}


def begun(args: argparse.Namespace, size: str, way: str) -> subprocess.Popen[str]:
    """Return a process that measures a size in a way when it is sent a line."""
    out = args.work / f"{size}-{way}" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    options = ["--text", args.text, "--tokens", args.tokens, "--seq-len", args.seq_len, "--recent", args.recent]
    options += ["--device", args.device, "--waits", *(["--calibration-only"] if args.calibration_only else [])]
    command = [sys.executable, __file__, "one", args.work / size, out, way, *options]
    return subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(args: argparse.Namespace) -> None:
    """Measure every size in every way, each in a process of its own, and keep what is found after each."""
    file = args.work / "scale.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for size in args.sizes.split(","):
        if not (args.work / size / "config.json").is_file():
            make(SHAPES[size], args.work / size, args.tokenizer, args.device)
    left = [(size, way) for size in args.sizes.split(",") for way in args.ways.split(",")]
    ahead = None
    for (size, way), following in zip(left, [*left[1:], None], strict=True):
        process = ahead or begun(args, size, way)
        # the processes of a shared run would be on the device already
        ahead = begun(args, *following) if following and following[1] not in SHARED else None
        told = process.communicate("\n")[0].splitlines()
        if process.returncode:
            print(f"{size} {way}: failed", flush=True)
            continue
        row = {"size": size} | json.loads(told[-1])
        row |= {"plans": plans_beside(args, size, way)}
        rows = [r for r in rows if (r["size"], r["way"]) != (size, way)] + [row]
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


def plans_beside(args: argparse.Namespace, size: str, way: str) -> dict[str, Any]:
    """Return how the plan of one way compares with those of others that were measured of as many tokens."""
    out, found = args.work / f"{size}-{way}" / "out", {}
    for other in args.work.glob(f"{size}-*/out"):
        if other != out and all((o / "kv_plan.json").is_file() for o in (out, other)):
            tokens = [json.loads((o / "kv_plan.json").read_text())["calibration"]["tokens"] for o in (out, other)]
            if tokens[0] == tokens[1]:
                found[other.parent.name.removeprefix(f"{size}-")] = same_plan(out, other)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of = {name: commands.add_parser(name) for name in ("measure", "one")}
    for name in ("measure", "one"):
        of[name].add_argument("--text", type=Path, required=True)
        of[name].add_argument("--tokens", type=int, default=65536)
        of[name].add_argument("--recent", type=int, default=64)
        of[name].add_argument("--calibration-only", action="store_true")
        of[name].add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    of["measure"].add_argument("work", type=Path)
    of["measure"].add_argument("--tokenizer", type=Path, required=True, help="A directory that has one.")
    of["measure"].add_argument("--sizes", default="0.1b,0.5b,1b,3b,8b")
    of["measure"].add_argument("--ways", default="whole,least")
    of["one"].add_argument("model", type=Path)
    of["one"].add_argument("out", type=Path)
    of["one"].add_argument("way")
    of["one"].add_argument("--waits", action="store_true", help="Begin when a line comes.")
    for command in of.values():
        command.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    if args.command == "measure":
        measure(args)
    else:
        print(json.dumps(measured(args.model, args.out, args, args.way)))


if __name__ == "__main__":
    main()
