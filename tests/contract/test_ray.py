"""The same work as tasks of a real Ray that runs on this machine, with its retries."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kvcompress.calibration import ray_cluster
from kvcompress.calibration.pieces import collect_shared
from kvcompress.calibration.ray_tasks import RayWorkers
from kvcompress.errors import CalibrationError, Note, OptionError
from kvcompress.evaluate.compare import Request, compare
from kvcompress.evaluate.shared import evaluate_shared
from kvcompress.options import CompressOptions
from kvcompress_cli import sharing
from tests.contract.test_shared_calibration import FAMILY, assert_same_plan, broken_job, kill_once, run
from tests.sharing import Backwards, awake


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    return run(tiny_checkpoint(FAMILY), text_file, tmp_path_factory.mktemp("alone") / "out", None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # processes that Ray itself lets go
class TestRay:
    """Two tasks at a time of a Ray that runs on this machine."""

    @pytest.fixture(scope="class")
    def workers(self) -> Iterator[RayWorkers]:
        ray = pytest.importorskip("ray")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = os.pathsep.join(p for p in sys.path if p)
            how = {"log_to_driver": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
            with pytest.MonkeyPatch.context() as environment:  # in which there may be no GPU; Ray is told of one
                environment.delenv("CUDA_VISIBLE_DEVICES", raising=False)
                ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, **how)
            workers = RayWorkers("auto")
            assert len(list(workers.each(awake, [()] * 4))) == 4  # else one that only imports may be killed
            yield workers
            workers.close()
            ray.shutdown()

    def test_a_worker_that_is_killed(
        self, workers: RayWorkers, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        """The plan is that of one process, and what was lost is said."""
        assert workers.n == 2
        killed: list[int] = []
        with pytest.warns(Note, match=r"Ray started another one: windows .* are summed again"):
            progress = kill_once(killed, lambda: counted_tasks(workers, begun=3))  # one of four is done, two run
            out = run(tiny_checkpoint(FAMILY), text_file, tmp_path / "out", workers, progress)
        assert killed
        assert_same_plan(out, alone)

    @pytest.mark.filterwarnings("ignore::kvcompress.errors.Note")  # a busy machine may lose a worker: figures stay
    def test_cells_of_compare_and_windows_of_eval(
        self, workers: RayWorkers, tiny_checkpoint: Any, text_file: Path, alone: Path, tmp_path: Path
    ) -> None:
        """The figures of one process, from tasks of a real cluster."""
        source = tiny_checkpoint(FAMILY)
        options = CompressOptions(calibration=(str(text_file),), tokens=256, seq_len=64, recent=8)
        request = Request(("default",), (0.5, 0.25), str(text_file), options, seq_len=128, max_windows=1)
        rows = []
        for name, who in (("alone", None), ("shared", workers)):
            document = compare(source, tmp_path / name, request, workers=who)
            rows.append([(row["keep_asked"], row["kl_nats"], row["bytes_per_token"]) for row in document["cells"]])
        assert len(rows[0]) == len(rows[1]) == 2
        for ours, theirs in zip(*rows, strict=True):  # sums are joined in the order in which tasks end
            assert ours == pytest.approx(theirs, rel=1e-3)
        how: dict[str, Any] = {"base": str(source), "seq_len": 64, "max_windows": 4}
        shared = evaluate_shared(alone, str(text_file), workers, dtype="float32", **how)
        here = evaluate_shared(alone, str(text_file), Backwards(), dtype="float32", **how)
        assert shared.log_ratios == pytest.approx(here.log_ratios, rel=1e-4, abs=1e-6) and len(here.log_ratios) == 4

    def test_who_counts_attempts_has_imported_next_to_nothing(self, workers: RayWorkers) -> None:
        ray = pytest.importorskip("ray")
        imported = workers._attempts().__ray_call__.remote(lambda _: "torch" in sys.modules)
        assert ray.get(imported) is False

    def test_a_worker_that_was_woken_is_who_works(self, workers: RayWorkers) -> None:
        """A GPU's: Ray would end it after one task. Nothing here uses the GPU that this Ray is told of."""
        ray = pytest.importorskip("ray")
        ray_cluster.wake("auto")
        imported = ray.remote(**ray_cluster.on_gpu(1))(lambda: "transformers.modeling_utils" in sys.modules).remote()
        assert ray.get(imported) is True

    def test_two_tasks_share_a_gpu(self, workers: RayWorkers) -> None:
        ray = pytest.importorskip("ray")

        def seen() -> tuple[list[int], float, float]:
            started = time.time()
            time.sleep(0.5)
            return ray.get_gpu_ids(), started, time.time()

        task = ray.remote(**ray_cluster.on_gpu(2))(seen)
        ray.get([task.remote(), task.remote()])  # workers have started
        (first, began, ended), (second, other_began, other_ended) = ray.get([task.remote(), task.remote()])
        assert first == second and len(first) == 1
        assert began < other_ended and other_began < ended

    def test_what_a_task_raises_arrives(self, workers: RayWorkers, tmp_path: Path) -> None:
        job = broken_job(tmp_path)
        with pytest.raises(CalibrationError, match="NaN"):
            collect_shared(job, workers)


def test_workers_are_woken_before_torch_is_imported() -> None:
    look = "import sys, kvcompress.calibration.ray_cluster, kvcompress_cli.sharing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0


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


@pytest.mark.parametrize(("device", "per_gpu", "n"), [("cuda", 1, 3), ("auto", 2, 6), ("cpu", 1, 0)])
def test_workers_of_gpus_begin_at_once(monkeypatch: pytest.MonkeyPatch, device: str, per_gpu: int, n: int) -> None:
    begun: list[float] = []

    def remote(*, num_gpus: float, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=lambda: begun.append(num_gpus))

    resources = lambda: {"GPU": 3.0, "CPU": 64.0}  # noqa: E731
    cluster = SimpleNamespace(is_initialized=lambda: True, cluster_resources=resources, remote=remote)
    monkeypatch.setitem(sys.modules, "ray", cluster)
    shared = sharing.Sharing(ray="auto", per_gpu=per_gpu)
    shared.wake(device)
    assert begun == [1 / per_gpu] * n
    assert RayWorkers("auto", "cuda", per_gpu).n == 3 * per_gpu


@pytest.mark.parametrize(
    ("of", "told"), [(None, "task 2 of 3 is done"), ([[0], [4, 5], [6]], "windows 4 to 5 are summed")]
)
def test_what_was_repeated_is_said(monkeypatch: pytest.MonkeyPatch, of: Any, told: str) -> None:
    """Of a Ray that is none; what items share is sent once."""
    sent: list[Any] = []
    taken = lambda reference: reference() if callable(reference) else reference  # noqa: E731

    def remote(**_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=lambda function, *a: lambda: function(*map(taken, a[3:]), "cpu"))

    def put(thing: Any) -> Any:
        sent.append(thing)
        return lambda: thing

    cluster = SimpleNamespace(is_initialized=lambda: True, remote=remote, put=put, get=taken)
    cluster.wait = lambda references, num_returns: (references[:1], references[1:])
    cluster.exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=IndexError)
    monkeypatch.setitem(sys.modules, "ray", cluster)
    workers = RayWorkers("auto")
    workers._counter = SimpleNamespace(of=SimpleNamespace(remote=lambda task: 1 + (task == (0, 1))))
    job = {"a": "job"}
    with pytest.warns(Note, match=f"another one: {told} again") as notes:
        found = list(workers.each(lambda *what: what, [(job, i, 7) for i in range(3)], of=of))
    assert found == [(i, (job, i, 7, "cpu")) for i in range(3)]
    assert sent == [job] and len(notes) == 1


def counted_tasks(workers: RayWorkers, *, begun: int) -> list[int]:
    """Return `ray_tasks` once so many of a call are counted as begun: one that dies before has nothing to repeat."""
    ray = pytest.importorskip("ray")
    counter, call = workers._attempts(), workers._n_calls - 1
    for _ in range(100):
        if sum(ray.get([counter.of.remote((call, index)) for index in range(begun + 1)])) >= begun:
            break
        time.sleep(0.02)
    return ray_tasks()


def ray_tasks() -> list[int]:
    """Return the processes of Ray that sum a piece, by the titles that it gives them; waits for one to begin."""
    for _ in range(300):
        found = []
        for process in psutil.Process().children(recursive=True):  # of this cluster, whatever else runs here
            with suppress(psutil.NoSuchProcess):
                found += [process.pid] * ("ray::_run" in " ".join(process.cmdline()))
        if found:
            return found
        time.sleep(0.1)
    return []
