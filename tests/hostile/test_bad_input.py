"""Bad input to compress(): one line that says what is wrong, nothing left behind, the source untouched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcompress.pipeline as pipeline
from kvcompress.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    KVCompressError,
    OptionError,
    OutputError,
    UnsupportedModelError,
)
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

INDEX = "model.safetensors.index.json"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def listing(directory: Path) -> dict[str, str]:
    """Return {path: SHA-256 of the file} of everything below a directory."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory"
        for p in sorted(directory.rglob("*"))
    }


@pytest.fixture
def source(tiny_checkpoint: Any, tmp_path: Path) -> Callable[[str], Path]:
    """source(family): a copy of a tiny checkpoint that may be damaged."""

    def copy(family: str) -> Path:
        shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
        return tmp_path / "model"

    return copy


@pytest.fixture
def refused(tmp_path: Path, text_file: Path) -> Callable[..., str]:
    """refused(error class, source, **options): the message of a refusal that left no trace."""

    def check(expected: type[KVCompressError], model: Any, output: Path | None = None, **options: Any) -> str:
        before = listing(tmp_path)
        with pytest.raises(KVCompressError) as error:
            values = {"calibration": (str(text_file),), "tokens": 128, "seq_len": 32} | options
            compress(model, output or tmp_path / "out", CompressOptions(**values), device="cpu")
        assert error.type is expected
        assert "\n" not in str(error.value)
        assert listing(tmp_path) == before
        return str(error.value)

    return check


def edit_json(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text())
    for path, value in changes.items():
        document[path] = value
    file.write_text(json.dumps(document))


def change_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite the file that holds a tensor; `change` returns None to remove it."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            save_file(tensors | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})


class TestWeights:
    def test_truncated_shard(self, source: Any, refused: Any) -> None:
        model = source("llama-sharded")
        shard = sorted(model.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        assert shard.name in refused(CheckpointError, model)

    @pytest.mark.parametrize("n_bytes", [0, 4, 50])
    def test_truncated_header(self, source: Any, refused: Any, n_bytes: int) -> None:
        model = source("llama-gqa")
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:n_bytes])
        assert "truncated or damaged" in refused(CheckpointError, model)

    def test_missing_tensor(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        change_tensor(model, K_PROJ, lambda t: None)
        assert f"tensor {K_PROJ} is missing" in refused(CheckpointError, model)

    def test_missing_bias(self, source: Any, refused: Any) -> None:
        model = source("qwen2")
        name = K_PROJ.replace("weight", "bias")
        change_tensor(model, name, lambda t: None)
        assert f"tensor {name} is missing" in refused(CheckpointError, model)

    def test_tensor_that_the_index_promises(self, source: Any, refused: Any) -> None:
        model = source("llama-sharded")
        change_tensor(model, "model.norm.weight", lambda t: None)
        assert "lacks tensor model.norm.weight" in refused(CheckpointError, model)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [K_PROJ, "model.layers.2.self_attn.v_proj.weight"])
    def test_values_that_are_not_finite(self, source: Any, refused: Any, name: str, value: float) -> None:
        def poison(tensor: torch.Tensor) -> torch.Tensor:
            tensor[3, 4] = value
            return tensor

        model = source("llama-gqa")
        change_tensor(model, name, poison)
        assert refused(CheckpointError, model).startswith(f"{name} holds 1 NaN or infinite values")

    def test_not_finite_bias(self, source: Any, refused: Any) -> None:
        model = source("qwen2")
        name = K_PROJ.replace("weight", "bias")
        change_tensor(model, name, lambda t: t.fill_(float("nan")))
        assert refused(CheckpointError, model).startswith(f"{name} holds 16 NaN")

    def test_not_finite_anywhere_else(self, source: Any, refused: Any) -> None:
        """Found by the calibration pass, not by a scan of all weights."""
        model = source("llama-gqa")
        change_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(float("nan")))
        assert "NaN" in refused(CalibrationError, model)

    def test_wrong_shape(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        change_tensor(model, K_PROJ, lambda t: t[:8].clone())
        assert f"tensor {K_PROJ} has shape [8, 32], expected [16, 32]" in refused(CheckpointError, model)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
    def test_wrong_dtype(self, source: Any, refused: Any, dtype: torch.dtype) -> None:
        model = source("llama-gqa")
        change_tensor(model, K_PROJ, lambda t: t.to(dtype))
        assert "expected F32, F16 or BF16" in refused(CheckpointError, model)

    def test_only_pickles(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
        assert "only pickled weights" in refused(CheckpointError, model)

    def test_no_weights(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        (model / "model.safetensors").unlink()
        assert "holds no model.safetensors" in refused(CheckpointError, model)


class TestIndex:
    def test_missing_file(self, source: Any, refused: Any) -> None:
        model = source("llama-sharded")
        shard = sorted(model.glob("model-*.safetensors"))[2]
        shard.unlink()
        assert f"{INDEX} names {shard.name}, which is missing" in refused(CheckpointError, model)

    @pytest.mark.parametrize("path", ["../other.safetensors", "/etc/passwd", "sub/../../other.safetensors", "..", "."])
    def test_paths_that_escape(self, source: Any, refused: Any, path: str) -> None:
        model = source("llama-sharded")
        shutil.copy(sorted(model.glob("model-*.safetensors"))[0], model.parent / "other.safetensors")
        document = json.loads((model / INDEX).read_text())
        document["weight_map"]["model.norm.weight"] = path
        (model / INDEX).write_text(json.dumps(document))
        assert path in refused(CheckpointError, model)

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}', '{"weight_map": {}}'],
    )
    def test_damaged_index(self, source: Any, refused: Any, content: str) -> None:
        model = source("llama-sharded")
        (model / INDEX).write_text(content)
        refused(CheckpointError, model)


class TestConfig:
    def test_no_config(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        (model / "config.json").unlink()
        assert "has no config.json" in refused(CheckpointError, model)

    @pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
    def test_damaged_config(self, source: Any, refused: Any, content: str) -> None:
        model = source("llama-gqa")
        (model / "config.json").write_text(content)
        assert "config.json" in refused(CheckpointError, model)

    def test_heads_that_do_not_divide(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", num_key_value_heads=3)
        message = refused(CheckpointError, model)
        assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in message

    def test_mla(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", model_type="deepseek_v3", kv_lora_rank=512)
        assert "multi-head latent attention" in refused(UnsupportedModelError, model)

    def test_unknown_family(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", model_type="bloom")
        assert "model type 'bloom' is not supported" in refused(UnsupportedModelError, model)

    def test_more_layers_than_weights(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", num_hidden_layers=4)
        assert "tensor model.layers.3.self_attn.k_proj.weight is missing" in refused(CheckpointError, model)

    def test_no_tokenizer(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        for file in model.glob("tokenizer*"):
            file.unlink()
        assert "has no usable tokenizer" in refused(CheckpointError, model)


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
    def test_the_source_is_never_written_to(
        self, source: Any, tmp_path: Path, output: str, maps_only: bool
    ) -> None:
        """Not even when asked to replace it: the original weights would be gone."""
        model = source("llama-gqa")
        before = listing(tmp_path)
        with pytest.raises(OutputError):
            compress(model, model / output, CompressOptions(metric="weights", maps_only=maps_only), force=True)
        assert listing(tmp_path) == before

    def test_no_space_told_beforehand(
        self, source: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 128 KB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs more rights")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-sharded"])
def test_success_leaves_the_source_untouched(source: Any, family: str, text_file: Path, tmp_path: Path) -> None:
    model = source(family)
    before = listing(model)
    options = CompressOptions(calibration=(str(text_file),), tokens=128, seq_len=32)
    compress(model, tmp_path / "results" / "out", options, device="cpu")
    assert listing(model) == before
    left = sorted(p.name.partition("-moments-")[0] for p in (tmp_path / "results").iterdir())
    assert left == ["kvcompress", "out"]  # the output, and the moments beside it
