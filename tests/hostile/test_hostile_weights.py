"""Weights and configurations that do not belong together: refused before anything is built by their numbers."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcompress
from kvcompress.errors import CheckpointError, KVCompressError, UnsupportedModelError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress


@pytest.fixture(scope="module")
def pristine(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pristine")
    shared: dict[str, Any] = {"metric": "weights", "policy": "uniform", "keep": 0.5}
    compress(tiny_checkpoint("llama-gqa"), directory / "coded", CompressOptions(recent=4, **shared))
    folded = CompressOptions(key_basis="frequency", folded=True, **shared)
    compress(tiny_checkpoint("llama-gqa"), directory / "folded", folded)
    return {"coded": directory / "coded", "folded": directory / "folded"}


@pytest.fixture(params=["coded", "folded"])
def output(request: pytest.FixtureRequest, pristine: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(pristine[request.param], tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "kv_plan.json").read_text())
    del plan["files"]  # what stands here must be found without fingerprints
    (tmp_path / "out" / "kv_plan.json").write_text(json.dumps(plan))
    return tmp_path / "out"


def refusal(directory: Path) -> str:
    started = time.perf_counter()
    with pytest.raises(KVCompressError) as error:
        kvcompress.load(directory)
    assert time.perf_counter() - started < 5
    assert error.type is CheckpointError and "\n" not in str(error.value)
    return str(error.value)


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 2**62},
        {"num_hidden_layers": -3},
        {"vocab_size": -320},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**10},
        {"intermediate_size": 49},
        {"head_dim": 10**9},
        {"num_key_value_heads": 10**9},
        {"hidden_size": []},
        {"rope_parameters": 3},
        {"rms_norm_eps": "small"},
        {"hidden_act": "no such function"},
        {"model_type": []},
        {"layer_types": 7},
    ],
    ids=json.dumps,
)
def test_configurations(output: Path, changes: dict[str, Any]) -> None:
    edit_config(output, **changes)
    refusal(output)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "[" * 200_000, "{}", "[]", '{"model": 3}'])
def test_files_of_other_kinds(output: Path, file: str, text: str) -> None:
    (output / file).write_text(text)
    from kvcompress.checkpoint.tokenizer import load_tokenizer

    with pytest.raises(CheckpointError):
        load_tokenizer(output) if file == "tokenizer.json" else kvcompress.load(output)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_never_made_up(output: Path, name: str) -> None:
    """transformers fills it with random numbers."""
    tensors = load_file(output / "model.safetensors")
    del tensors[name]
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    assert name in refusal(output)


def test_pickled_weights_are_never_opened(pristine: dict[str, Path], tmp_path: Path) -> None:
    """Not by way of a base that has nothing else, either."""
    shutil.copytree(pristine["coded"], tmp_path / "base")
    torch.save(load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "maps").mkdir()
    plan = json.loads((pristine["coded"] / "kv_plan.json").read_text())
    del plan["files"]
    (tmp_path / "maps" / "kv_plan.json").write_text(json.dumps(plan))
    shutil.copy(pristine["coded"] / "kv_maps.safetensors", tmp_path / "maps")
    with pytest.raises(CheckpointError, match="pickled"):
        kvcompress.load(tmp_path / "maps", base=tmp_path / "base")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "anything.json"])
def test_a_gigabyte_of_json_is_not_given_to_transformers(output: Path, name: str) -> None:
    from kvcompress.checkpoint.tokenizer import load_tokenizer

    with (output / name).open("ab") as file:
        file.truncate(10**9)
    assert f"{name} has 1,000,000,000 bytes" in refusal(output)
    with pytest.raises(CheckpointError, match="1,000,000,000 bytes"):
        load_tokenizer(output)


@pytest.mark.parametrize("model_type", ["stranger", "t5"])
def test_code_beside_the_weights_is_neither_run_nor_asked_for(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: Any, capsys: Any, model_type: str
) -> None:
    """transformers asks on the terminal, for as long as nobody has said no."""
    from kvcompress.checkpoint.reader import open_checkpoint

    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama-gqa"), model)
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).write_text('')\n"
    (model / "code.py").write_text(code + "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n")
    config = json.loads((model / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": named}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(KVCompressError), open_checkpoint(model):
        pass
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_model_that_is_no_decoder_is_said_to_be(tiny_checkpoint: Any, tmp_path: Path) -> None:
    from kvcompress.checkpoint.reader import open_checkpoint

    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama-gqa"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match="transformers has no decoder of it"), open_checkpoint(model):
        pass
