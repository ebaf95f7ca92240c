"""Windows shared out among workers: the moments and the plan of one process, also where a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.pieces import Job, Piece, Workers, collect_shared, pieces_of, sum_piece
from kvcompress.calibration.processes import LocalWorkers, workers_on_gpus
from kvcompress.calibration.ray_tasks import RayWorkers
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE
from tests.hostile.test_bad_checkpoint import change_tensor
from tests.tiny_models import random_ids, save_tiny_checkpoint

FAMILY = "llama-gqa"


class Backwards:
    """Workers that are none: this process sums the pieces, the last one first."""

    n = 3

    def sums(self, job: Job, pieces: list[Piece]) -> Any:
        for piece in reversed(pieces):
            yield piece, sum_piece(job, piece, "cpu")


def job_of(directory: Path, n_windows: int = 12) -> Job:
    windows = random_ids(n_windows, 48, seed=7)
    return Job(str(directory), "float32", windows, sinks=2, recent=4, seed=3, group=2, band=16)


def one_process(job: Job) -> Moments:
    with open_checkpoint(job.checkpoint) as checkpoint:
        model = load_weights(checkpoint.path, dtype="float32")
        moments = empty_moments(checkpoint.spec, {}, group=job.group, band=job.band)
        seen = {"sinks": job.sinks, "recent": job.recent, "seed": job.seed}
        return collect_moments(model, checkpoint.spec, job.windows, moments, **seen)


def started(job: Job) -> Moments:
    with open_checkpoint(job.checkpoint) as checkpoint:
        return empty_moments(checkpoint.spec, {}, group=job.group, band=job.band)


def assert_same(a: Moments, b: Moments) -> None:
    assert a.n_windows == b.n_windows and a.sites.keys() == b.sites.keys()
    assert a.rotations == b.rotations and a.signature == b.signature != ()
    for site, sums in a.sites.items():
        other = b.sites[site]
        assert sums.n_tokens == other.n_tokens
        assert torch.equal(sums.samples, other.samples)  # the same tokens in the same order
        for x, y in zip(
            (sums.total, *sums.outer, *sums.fisher), (other.total, *other.outer, *other.fisher), strict=True
        ):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("n_windows", "start", "n_workers", "sizes"),
    [(12, 0, 2, [3, 3, 3, 3]), (5, 0, 4, [1] * 5), (100, 10, 2, [8] * 11 + [2]), (7, 7, 2, []), (1, 0, 8, [1])],
)
def test_pieces_cover_every_window_once(n_windows: int, start: int, n_workers: int, sizes: list[int]) -> None:
    pieces = pieces_of(n_windows, start, n_workers)
    assert [p.stop - p.start for p in pieces] == sizes
    assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(start, n_windows))


def test_pieces_in_any_order_are_the_whole(tiny_checkpoint: Any) -> None:
    job = job_of(tiny_checkpoint(FAMILY))
    told: list[int] = []
    shared = collect_shared(job, started(job), Backwards(), progress=lambda done, total: told.append(done))
    assert_same(shared, one_process(job))
    assert told == sorted(told) and told[-1] == 12 * 48


def test_goes_on_with_what_other_workers_left(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Killed when some pieces were joined: another number of workers goes on from there."""
    job = job_of(tiny_checkpoint(FAMILY))

    class Killed(Backwards):
        def sums(self, job: Job, pieces: list[Piece]) -> Any:
            for piece in pieces[:3]:
                yield piece, sum_piece(job, piece, "cpu")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_shared(job, started(job), Killed(), partial_file=tmp_path / "partial.safetensors")
    left = Moments.load(tmp_path / "partial.safetensors")
    assert left.n_windows == 6
    assert_same(collect_shared(job, left, Backwards()), one_process(job))


def run(source: Path, text: Path, out: Path, workers: Workers | None, progress: Any = None) -> Path:
    options = CompressOptions(calibration=(str(text),), tokens=512, seq_len=32, recent=4, keep=0.25)
    compress(source, out, options, device="cpu", workers=workers, progress=progress)
    return out


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    return run(tiny_checkpoint(FAMILY), text_file, tmp_path_factory.mktemp("alone") / "out", None)


def assert_same_plan(out: Path, alone: Path) -> None:
    """Bits equal, maps equal to rounding."""
    plan, expected = (json.loads((o / PLAN_FILE).read_text()) for o in (out, alone))
    for site, other in zip(plan["sites"], expected["sites"], strict=True):
        assert site["bits"] == other["bits"]
        assert site["predicted_loss"] == pytest.approx(other["predicted_loss"], rel=1e-6)
    ours, theirs = (load_file(o / "kv_maps.safetensors") for o in (out, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), rtol=1e-3, atol=1e-5), name


class TestProcesses:
    """Two processes on the CPU, for real."""

    def test_the_plan_is_that_of_one_process(
        self, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        workers = LocalWorkers(("cpu", "cpu"))
        assert_same_plan(run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", workers), alone)

    def test_a_worker_that_is_killed(self, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path) -> None:
        killed: list[int] = []
        with pytest.warns(Note, match=r"a worker of the calibration died: windows .* are summed again"):
            workers = LocalWorkers(("cpu", "cpu"))
            out = run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", workers, kill_once(killed, spawned))
        assert killed
        assert_same_plan(out, alone)

    def test_what_a_worker_raises_arrives(self, tiny_checkpoint: Any, tmp_path: Path) -> None:
        """Once, not over and over: a model that cannot be calibrated is no worker that died."""
        broken = save_tiny_checkpoint(tmp_path / "model", FAMILY)
        change_tensor(broken, "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(float("nan")))
        job = job_of(broken, 2)
        with pytest.raises(CalibrationError, match="NaN"):
            collect_shared(job, started(job), LocalWorkers(("cpu",)))


class TestRay:
    """Two tasks at a time of a Ray that runs on this machine."""

    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[Any]:
        ray = pytest.importorskip("ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = os.pathsep.join(p for p in sys.path if p)
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}}
            )
            yield ray
            ray.shutdown()

    def test_the_plan_is_that_of_one_process(
        self, cluster: Any, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        assert RayWorkers("auto").n == 2
        assert_same_plan(run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", RayWorkers("auto")), alone)

    def test_a_worker_that_is_killed(
        self, cluster: Any, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        killed: list[int] = []
        with pytest.warns(Note, match=r"Ray started another one: windows .* are summed again"):
            progress = kill_once(killed, ray_tasks)
            out = run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", RayWorkers("auto"), progress)
        assert killed
        assert_same_plan(out, alone)

    def test_what_a_task_raises_arrives(self, cluster: Any, tmp_path: Path) -> None:
        broken = save_tiny_checkpoint(tmp_path / "model", FAMILY)
        change_tensor(broken, "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(float("nan")))
        job = job_of(broken, 2)
        with pytest.raises(CalibrationError, match="NaN"):
            collect_shared(job, started(job), RayWorkers("auto"))


def test_no_ray_and_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install 'kvcompress\[ray\]'"):
        _ = RayWorkers("auto").n

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("could not find any running instance\nof Ray")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=refuse))
    with pytest.raises(OptionError, match="no Ray cluster answers at 'auto'") as error:
        _ = RayWorkers("auto").n
    assert "\n" not in str(error.value)


def ray_tasks() -> list[int]:
    """Return the processes of Ray that sum a piece, by the titles that it gives them; waits for one to begin."""
    for _ in range(300):
        found = [p.pid for p in psutil.process_iter(["cmdline"]) if "ray::_sum" in " ".join(p.info["cmdline"] or ())]
        if found:
            return found
        time.sleep(0.1)
    return []


def spawned() -> list[int]:
    """Return the processes that this one spawned."""
    return [p.pid for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def kill_once(killed: list[int], pids: Callable[[], list[int]]) -> Callable[[str, int, int], None]:
    """Return a progress callback that kills one of the workers, when a first piece is done."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and not killed:
            killed.append(next(pid for pid in pids() if pid not in killed))
            os.kill(killed[0], signal.SIGKILL)

    return progress


@pytest.mark.parametrize("asked", ["all", "2", "0,1"])
def test_gpus_where_there_is_none(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match="there is none here"):
        workers_on_gpus(asked)


def test_gpus_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert workers_on_gpus("all").devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert workers_on_gpus("2").devices == ("cuda:0", "cuda:1")
    assert workers_on_gpus("0,3").devices == ("cuda:0", "cuda:3")
    for wrong in ("5", "0,4", "0,0", "many", "", "-1", "0"):
        with pytest.raises(OptionError):
            workers_on_gpus(wrong)
