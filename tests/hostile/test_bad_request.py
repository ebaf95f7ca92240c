"""Texts, options and outputs that cannot be: one line that says what is wrong, nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvcompress.pipeline as pipeline
from kvcompress.errors import BudgetError, CalibrationError, OptionError, OutputError, UnsupportedModelError
from kvcompress.evaluate.compare import Request, compare
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from tests.hostile.conftest import listing


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 128 KB; skips where mounting is not allowed."""
    yield from mounted_at(tmp_path / "disk", "size=128k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that is only read, also by root; skips where mounting is not allowed."""
    yield from mounted_at(tmp_path / "disk", "ro")


def mounted_at(disk: Path, options: str) -> Iterator[Path]:
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs more rights")
    yield disk
    subprocess.run(["umount", disk], check=True)


class TestText:
    def test_too_little(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("The river turned.")
        message = refused(CalibrationError, source("llama-gqa"), calibration=(str(tmp_path / "short.txt"),))
        assert "too little text" in message and "--tokens" in message

    def test_missing(self, source: Any, refused: Any) -> None:
        assert "does not exist" in refused(CalibrationError, source("llama-gqa"), calibration=("nowhere.txt",))

    def test_not_utf8(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "latin.txt").write_bytes("Grüße ".encode("latin-1") * 500)
        assert "not UTF-8" in refused(CalibrationError, source("llama-gqa"), calibration=(str(tmp_path / "latin.txt"),))

    def test_data_free_mode_of_a_model_with_key_norms(self, source: Any, refused: Any) -> None:
        assert "normalises its keys" in refused(UnsupportedModelError, source("qwen3"), metric="weights")


class TestOptions:
    @pytest.mark.parametrize("keep", [0, 1.5])
    def test_keep(self, source: Any, refused: Any, keep: float) -> None:
        assert "keep must be above 0 and at most 1" in refused(OptionError, source("llama-gqa"), keep=keep)

    def test_keep_that_leaves_nothing(self, source: Any, refused: Any) -> None:
        message = refused(BudgetError, source("llama-gqa"), keep=0.001, metric="weights")
        assert "no room for a single component" in message

    def test_middle_that_cannot_reach_the_budget(self, source: Any, refused: Any) -> None:
        options = {"policy": "middle", "layers": "1:2", "keep": 0.5, "metric": "weights"}
        assert "keep cannot go below 0.667" in refused(BudgetError, source("llama-gqa"), **options)

    @pytest.mark.parametrize("metric", ["weights", "fisher"])
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"group": 3}, "cannot be split into groups of 3"),
            ({"key_basis": "band", "band": 6}, "cannot be split into bands of 6"),
            ({"policy": "middle", "layers": "third"}, "START:STOP"),
        ],
        ids=["group", "band", "layers"],
    )
    def test_sizes_that_do_not_fit(
        self, source: Any, refused: Any, options: dict[str, Any], reason: str, metric: str
    ) -> None:
        """Found before any calibration, not after it."""
        assert reason in refused(OptionError, source("llama-gqa"), metric=metric, **options)

    def test_folding_what_cannot_fold(self, source: Any, refused: Any) -> None:
        options = {"key_basis": "frequency", "folded": True, "metric": "weights"}
        assert "fused projection" in refused(UnsupportedModelError, source("phi3"), **options)


class TestOutput:
    def test_not_empty(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
        assert "is not empty" in refused(OutputError, source("llama-gqa"))

    def test_is_a_file(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        assert "is a file" in refused(OutputError, source("llama-gqa"))

    def test_below_a_file(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        refused(OutputError, source("llama-gqa"), tmp_path / "file" / "out", metric="weights")

    @pytest.mark.parametrize("output", [".", "out"], ids=["itself", "inside"])
    @pytest.mark.parametrize("maps_only", [False, True])
    def test_the_source_is_never_written_to(self, source: Any, tmp_path: Path, output: str, maps_only: bool) -> None:
        """Not even when asked to replace it: the original weights would be gone."""
        model = source("llama-gqa")
        before = listing(tmp_path)
        with pytest.raises(OutputError):
            compress(model, model / output, CompressOptions(metric="weights", maps_only=maps_only), force=True)
        assert listing(tmp_path) == before

    def test_no_space_told_beforehand(self, source: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        free = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr("kvcompress.checkpoint.writer.shutil.disk_usage", lambda _: free)
        assert "0.0 MB are free" in refused(OutputError, source("llama-gqa"))

    @pytest.mark.parametrize("stage", ["copy_checkpoint", "save_maps", "model_card"])
    def test_no_space_while_writing(
        self, source: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, stage: str
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(pipeline, stage, fail)
        assert "no space left" in refused(OutputError, source("llama-gqa"), metric="weights")

    def test_no_space_in_a_new_place(
        self, source: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The directories made on the way to the output go as well."""

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(pipeline, "save_maps", fail)
        refused(OutputError, source("llama-gqa"), tmp_path / "new" / "place" / "out", metric="weights")

    @pytest.mark.parametrize("options", [{"maps_only": False}, {"key_basis": "frequency", "folded": True}], ids=str)
    @pytest.mark.parametrize("told", [True, False], ids=["checked", "unchecked"])
    def test_a_full_file_system(
        self, source: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: bool
    ) -> None:
        """A real file system of 128 KB, and a checkpoint of 170."""
        model = source("llama-gqa")
        before = listing(model)
        if not told:
            monkeypatch.setattr(pipeline, "check_space", lambda *_: None)
        with pytest.raises(OutputError, match="no space left") as error:
            compress(model, small_disk / "out", CompressOptions(metric="weights", **options))
        assert "\n" not in str(error.value)
        assert list(small_disk.iterdir()) == []
        assert listing(model) == before

    @pytest.mark.parametrize("place", ["out", "new/place/out"])
    def test_a_read_only_file_system(self, source: Any, text_file: Path, read_only: Path, place: str) -> None:
        """Calibration writes first, beside the output."""
        options = CompressOptions(calibration=(str(text_file),), tokens=128, seq_len=32)
        with pytest.raises(OutputError, match=r"no permission to write .*Read-only"):
            compress(source("llama-gqa"), read_only / place, options, device="cpu")

    def test_directories_made_for_a_calibration_that_failed(self, source: Any, refused: Any, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("The river turned.")
        target = tmp_path / "new" / "place" / "out"
        refused(CalibrationError, source("llama-gqa"), target, calibration=(str(tmp_path / "short.txt"),))

    def test_a_comparison_that_cannot_be_written(self, source: Any, text_file: Path, read_only: Path) -> None:
        options = CompressOptions(calibration=(str(text_file),), tokens=128, seq_len=256)
        request = Request(("fp8",), (0.5,), str(text_file), options, seq_len=256, max_windows=1)
        with pytest.raises(OutputError, match="no permission to write"):
            compare(source("llama-gqa"), read_only / "comparison", request)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-sharded"])
def test_success_leaves_the_source_untouched(source: Any, family: str, text_file: Path, tmp_path: Path) -> None:
    model = source(family)
    before = listing(model)
    options = CompressOptions(calibration=(str(text_file),), tokens=128, seq_len=32)
    compress(model, tmp_path / "results" / "out", options, device="cpu")
    assert listing(model) == before
    left = sorted(p.name.partition("-moments-")[0] for p in (tmp_path / "results").iterdir())
    assert left == ["kvcompress", "out"]  # the output, and the moments beside it


@pytest.mark.parametrize("family", ["llama-gqa", "llama-sharded"])
@pytest.mark.parametrize("options", [{}, {"key_basis": "frequency", "folded": True}], ids=["coded", "folded"])
def test_weights_are_written_once(source: Any, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Mistral's repositories hold them twice, as consolidated.safetensors beside what transformers loads."""
    model = source(family)
    plain = CompressOptions(metric="weights", policy="uniform", keep=0.5, **options)
    compress(model, tmp_path / "once", plain)
    weights = sorted(model.glob("model*.safetensors"))
    for i, file in enumerate(weights):
        shutil.copy(
            file, model / ("consolidated.safetensors" if len(weights) == 1 else f"consolidated-{i}.safetensors")
        )
    (model / "consolidated.safetensors.index.json").write_text("{}")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"x" * 1000)
    (model / "original" / "params.json").write_text("{}")
    compress(model, tmp_path / "out", plain)
    assert listing(tmp_path / "out").keys() == listing(tmp_path / "once").keys()
