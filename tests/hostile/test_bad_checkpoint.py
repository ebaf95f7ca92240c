"""Damaged and unsupported checkpoints: one line that says what is wrong, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcompress.errors import CalibrationError, CheckpointError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


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

    @pytest.mark.parametrize(
        "path", ["../other.safetensors", "/etc/passwd", "sub/../../other.safetensors", "..", ".", "é" * 200]
    )
    def test_paths_that_escape(self, source: Any, refused: Any, path: str) -> None:
        model = source("llama-sharded")
        shutil.copy(sorted(model.glob("model-*.safetensors"))[0], model.parent / "other.safetensors")
        document = json.loads((model / INDEX).read_text())
        document["weight_map"]["model.norm.weight"] = path
        (model / INDEX).write_text(json.dumps(document))
        assert path in refused(CheckpointError, model)

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "3", "{}", *(f'{{"weight_map": {m}}}' for m in ("[]", "{}", '{"a": 3}', '{"a": []}'))],
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

    def test_unknown_family(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", model_type="blume")
        assert "model type 'blume' is not supported" in refused(UnsupportedModelError, model)

    def test_weights_of_another_family(self, source: Any, refused: Any) -> None:
        """Transformers would make up what is missing, at random."""
        model = source("llama-gqa")
        edit_json(model / "config.json", model_type="bloom")
        assert "of its weights, transformer." in refused(CheckpointError, model)

    def test_no_cache_that_grows(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", model_type="mamba")
        found = refused(UnsupportedModelError, model)
        assert "model type 'mamba' is not supported: " in found
        # since 5.24 of transformers it takes a cache, which holds a state
        assert "its forward takes no cache" in found or "there is nothing to compress" in found

    def test_more_layers_than_weights(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        edit_json(model / "config.json", num_hidden_layers=4)
        assert "tensor model.layers.3.self_attn.k_proj.weight is missing" in refused(CheckpointError, model)

    def test_no_tokenizer(self, source: Any, refused: Any) -> None:
        model = source("llama-gqa")
        for file in model.glob("tokenizer*"):
            file.unlink()
        assert "has no usable tokenizer" in refused(CheckpointError, model)
