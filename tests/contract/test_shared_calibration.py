"""Windows shared out among workers: the moments and the plan of one process, also where a worker is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kvcompress.calibration import processes
from kvcompress.calibration.fisher import collect_moments
from kvcompress.calibration.moments import Moments, empty_moments
from kvcompress.calibration.parts import Parts, Seldom
from kvcompress.calibration.pieces import Workers, collect_shared, pieces_of, ranges
from kvcompress.calibration.processes import LocalWorkers, workers_on_gpus
from kvcompress.calibration.site_moments import SiteMoments
from kvcompress.calibration.worker import Job, Sums
from kvcompress.checkpoint.loading import load_weights
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE
from tests.hostile.test_bad_checkpoint import change_tensor
from tests.sharing import Backwards, leave_workers
from tests.tiny_models import random_ids, save_tiny_checkpoint

FAMILY = "llama-gqa"


def job_of(source: Path, directory: Path, n_windows: int = 12, *, resume: bool = False) -> Job:
    windows = random_ids(n_windows, 48, seed=7)
    parts = Parts.opened(directory / "parts", {"of": str(source)}, tuple(windows.shape), sinks=2, resume=resume)
    return Job(str(source), "float32", windows, sinks=2, recent=4, seed=3, group=2, band=16, parts=parts)


def one_process(job: Job) -> Moments:
    with open_checkpoint(job.checkpoint) as checkpoint:
        model = load_weights(checkpoint.path, dtype="float32")
        moments = empty_moments(checkpoint.spec, {}, group=job.group, band=job.band)
        seen = {"sinks": job.sinks, "recent": job.recent, "seed": job.seed}
        return collect_moments(model, checkpoint.spec, job.windows, moments, **seen)


def sums_of(m: SiteMoments) -> tuple[torch.Tensor, ...]:
    return m.total, *m.outer, *m.fisher, m.weighed_total, *m.weighed_outer


def assert_same(a: Moments, b: Moments) -> None:
    assert a.order == b.order and a.sites.keys() == b.sites.keys()
    assert a.rotations == b.rotations and a.signature == b.signature != ()
    for site, sums in a.sites.items():
        other = b.sites[site]
        assert sums.n_tokens == other.n_tokens
        assert torch.equal(sums.samples, other.samples)  # the same tokens in the same order
        assert torch.equal(sums.weighed_samples, other.weighed_samples)
        for x, y in zip(sums_of(sums), sums_of(other), strict=True):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("windows", "n_workers", "sizes"),
    [
        (range(12), 2, [3, 3, 3, 3]),
        (range(5), 4, [1] * 5),
        (range(10, 100), 2, [8] * 11 + [2]),
        ([], 2, []),
        ([0], 8, [1]),
        ([1, 4, 5, 9], 1, [2, 2]),
    ],
)
def test_pieces_cover_every_window_once(windows: Sequence[int], n_workers: int, sizes: list[int]) -> None:
    pieces = pieces_of(windows, n_workers, 8)
    assert [len(p) for p in pieces] == sizes
    assert [i for p in pieces for i in p] == list(windows)


def test_pieces_in_any_order_are_the_whole(tiny_checkpoint: Any, tmp_path: Path) -> None:
    job = job_of(tiny_checkpoint(FAMILY), tmp_path)
    told: list[int] = []
    shared = collect_shared(job, Backwards(), progress=lambda done, total: told.append(done))
    assert_same(shared, one_process(job))
    assert told == sorted(told) and told[-1] == 12 * 48


class TestParts:
    """What is left of a calibration that was killed."""

    def part(self, job: Job, windows: list[int]) -> None:
        sums = Sums(job, "cpu")
        sums.add(windows)
        assert sums.save()

    def test_other_workers_go_on(self, tiny_checkpoint: Any, tmp_path: Path) -> None:
        """Parts of several workers, with holes: the windows in them are not summed again."""
        source = tiny_checkpoint(FAMILY)
        job = job_of(source, tmp_path)
        self.part(job, [7, 3])
        self.part(job, [0, 1])
        assert not list((tmp_path / "parts").glob(".*"))
        job = job_of(source, tmp_path, resume=True)
        assert job.parts.missing() == [2, 4, 5, 6, 8, 9, 10, 11]
        workers = Backwards()
        assert_same(collect_shared(job, workers), one_process(job))
        assert workers.summed == [2, 4, 5, 6, 8, 9, 10, 11]

    def test_what_is_all_there_is_summed_no_more(self, tiny_checkpoint: Any, tmp_path: Path) -> None:
        job = job_of(tiny_checkpoint(FAMILY), tmp_path)
        self.part(job, [*range(6, 12)])
        self.part(job, [*range(6)])
        assert_same(collect_shared(job, Backwards()), one_process(job))

    @pytest.mark.parametrize("change", [{"resume": False}, {"protocol": {"of": "another text"}}])
    def test_others_are_not_taken(self, tiny_checkpoint: Any, tmp_path: Path, change: dict[str, Any]) -> None:
        job = job_of(tiny_checkpoint(FAMILY), tmp_path)
        self.part(job, [0])
        how = {"protocol": {"of": job.checkpoint}, "resume": True} | change
        parts = Parts.opened(tmp_path / "parts", how["protocol"], (12, 48), sinks=2, resume=how["resume"])
        assert parts.missing() == list(range(12))

    def test_parts_that_overlap(self, tiny_checkpoint: Any, tmp_path: Path) -> None:
        job = job_of(tiny_checkpoint(FAMILY), tmp_path)
        self.part(job, [0, 1])
        self.part(job, [1])
        with pytest.raises(CalibrationError, match="overlap"):
            job.parts.missing()


def test_sums_are_saved_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the first window, whose saving would take longer than the window; then 5% of the time at most."""
    now, saved = [100.0], list[float]()

    def save(_: Any) -> None:
        saved.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("kvcompress.calibration.parts.time", SimpleNamespace(monotonic=lambda: now[0]))
    seldom, sums = Seldom(save), SimpleNamespace(nbytes=400_000_000)  # a second, as far as is known
    for _ in range(80):
        now[0] += 1.0
        seldom(sums)  # type: ignore[arg-type]
    assert saved == [121.0, 163.0]


@pytest.mark.parametrize(("windows", "told"), [([], ""), ([3], "3"), ([5, 1, 2, 0, 7], "0 to 2, 5, 7")])
def test_ranges(windows: list[int], told: str) -> None:
    assert ", ".join(ranges(windows)) == told


def test_a_whole_compression(tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path) -> None:
    """Windows, coherence and fits, all by workers."""
    workers = Backwards()
    assert_same_plan(run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", workers), alone)
    assert workers.summed == list(range(16)) and set(workers.called) == {"watch_windows", "fits_of", "_fitted"}


def test_who_leads_computes_where_one_process_would(
    tiny_checkpoint: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not sent to workers is not left to a processor for that."""
    asked: list[str] = []
    monkeypatch.setattr("kvcompress.pipeline.fitting_device", lambda device, *_: asked.append(device) or "cpu")
    options = CompressOptions(calibration=(str(text_file),), tokens=64, seq_len=32, recent=4, maps_only=True)
    compress(tiny_checkpoint(FAMILY), tmp_path / "out", options, device="cuda", workers=Backwards())
    assert asked[0] == "cuda"


def run(source: Path, text: Path, out: Path, workers: Workers | None, progress: Any = None) -> Path:
    options = CompressOptions(calibration=(str(text),), tokens=512, seq_len=32, recent=4, keep=0.25)
    compress(source, out, options, device="cpu", workers=workers, progress=progress)
    assert [p.name for p in out.parent.iterdir() if "partial" in p.name] == []
    return out


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    return run(tiny_checkpoint(FAMILY), text_file, tmp_path_factory.mktemp("alone") / "out", None)


def assert_same_plan(out: Path, alone: Path) -> None:
    """Bits equal, maps equal to rounding; the sign of a component is anybody's."""
    plan, expected = (json.loads((o / PLAN_FILE).read_text()) for o in (out, alone))
    for site, other in zip(plan["sites"], expected["sites"], strict=True):
        assert site["bits"] == other["bits"]
        assert site["predicted_loss"] == pytest.approx(other["predicted_loss"], rel=1e-6)
    ours, theirs = (load_file(o / "kv_maps.safetensors") for o in (out, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        mine, other = tensor.double(), theirs[name].double()
        if name.endswith(("encoder", "decoder")):
            mine = mine * (mine * other).sum(1, keepdim=True).sign()
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5), name


def broken_job(tmp_path: Path) -> Job:
    """A model that cannot be calibrated, which is no worker that died."""
    broken = save_tiny_checkpoint(tmp_path / "model", FAMILY)
    change_tensor(broken, "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(float("nan")))
    return job_of(broken, tmp_path, 2)


class TestProcesses:
    """Two processes on the CPU, for real; they stay for all tests, since they take seconds to begin."""

    @pytest.fixture(scope="class")
    def workers(self) -> Iterator[LocalWorkers]:
        workers = LocalWorkers(("cpu", "cpu"))
        yield workers
        workers.close()

    def test_a_worker_that_is_killed(
        self, workers: LocalWorkers, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        """The plan is that of one process, and what was lost is said."""
        killed: list[int] = []
        with pytest.warns(Note, match=r"a worker of the calibration died: windows .* are summed again"):
            out = run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", workers, kill_once(killed, spawned))
        assert killed
        assert_same_plan(out, alone)

    def test_streamed_by_both(
        self, workers: LocalWorkers, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Progress tells of layers, not only of windows that are done."""
        pytest.importorskip("accelerate")
        monkeypatch.setattr(processes, "_LOOK_SECONDS", 0.01)
        job = replace(job_of(tiny_checkpoint(FAMILY), tmp_path), memory=1 << 30)
        told: list[int] = []
        found = collect_shared(job, workers, progress=lambda done, total: told.append(done))
        assert_same(found, one_process(job))
        assert told == sorted(told) and told[-1] == job.windows.numel() and len(set(told)) > workers.n

    def test_what_a_worker_raises_arrives(self, workers: LocalWorkers, tmp_path: Path) -> None:
        job = broken_job(tmp_path)
        with pytest.raises(CalibrationError, match="NaN"):
            collect_shared(job, workers)


def test_a_process_of_multiprocessing_ends() -> None:
    """With workers that nobody closed, and with some that were a moment ago."""
    process = multiprocessing.get_context("spawn").Process(target=leave_workers)
    process.start()
    process.join(150)
    code, _ = process.exitcode, process.kill()
    assert code == 0


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


def test_a_task_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next process, where one dies with it; and that is said."""
    dies, restarted = [False, True], []

    def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if dies.pop(0) if dies else False:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(function(*args))
        return future

    worker = SimpleNamespace(device="cpu", submit=submit, restart=lambda: restarted.append(1))
    monkeypatch.setattr(LocalWorkers, "_workers", lambda self: [worker])
    workers = LocalWorkers(("cpu",))
    with pytest.warns(Note, match=r"a worker died: task 1 of 2 is done again"):
        found = dict(workers.each(lambda x, device: (x, device), [("a",), ("b",)]))
    assert found == {0: ("a", "cpu"), 1: ("b", "cpu")} and restarted == [1]


@pytest.mark.parametrize("asked", ["all", "2", "0,1"])
def test_gpus_where_there_is_none(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError, match="there is none here"):
        workers_on_gpus(asked)


@pytest.mark.parametrize(
    ("n_bytes", "spread"),
    [
        (50, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        (150, ("cuda:0+cuda:1", "cuda:2+cuda:3")),
        (250, ("cuda:0+cuda:1+cuda:2",)),
        (400, None),
    ],
)
def test_a_model_larger_than_a_gpu(
    monkeypatch: pytest.MonkeyPatch, n_bytes: int, spread: tuple[str, ...] | None
) -> None:
    """Layers are spread over as many as it takes; over none where all are too few: then it is streamed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(LocalWorkers, "_workers", lambda self: [])
    workers = LocalWorkers([f"cuda:{i}" for i in range(4)])
    assert workers.hold(n_bytes) is (spread is not None)
    assert spread is None or workers.devices == spread
    assert workers.is_spread is (spread is not None and len(spread) < 4)


@pytest.mark.parametrize(("n_bytes", "left"), [(40, 4), (60, 2)])
def test_a_gpu_that_processes_share(monkeypatch: pytest.MonkeyPatch, n_bytes: int, left: int) -> None:
    """Each has a model of its own; where they do not fit together, one process has the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(LocalWorkers, "_workers", lambda self: [])
    workers = workers_on_gpus("all", 2)
    assert workers.devices == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    with pytest.warns(Note, match="one process has it") if left == 2 else nullcontext():
        assert workers.hold(n_bytes) and not workers.is_spread
    assert workers.devices == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")[:left]


def test_gpus_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(LocalWorkers, "_workers", lambda self: [])
    assert workers_on_gpus("all").devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert workers_on_gpus("2").devices == ("cuda:0", "cuda:1")
    assert workers_on_gpus("0,3").devices == ("cuda:0", "cuda:3")
    for wrong in ("5", "0,4", "0,0", "many", "", "-1", "0"):
        with pytest.raises(OptionError):
            workers_on_gpus(wrong)
