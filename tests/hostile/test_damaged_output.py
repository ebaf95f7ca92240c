"""A compressed checkpoint that was damaged afterwards: load() says so instead of running."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvcompress
from kvcompress.errors import CheckpointError, KVCompressError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

MAPS = "kv_maps.safetensors"
KEY = "layers.1.key"


@pytest.fixture(scope="module")
def pristine(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A coded and a folded output."""
    directory = tmp_path_factory.mktemp("pristine")
    coded = CompressOptions(metric="weights", policy="uniform", recent=4, keep=0.5)
    folded = CompressOptions(metric="weights", policy="uniform", keep=0.5, key_basis="frequency", folded=True)
    compress(tiny_checkpoint("llama-gqa"), directory / "coded", coded)
    compress(tiny_checkpoint("llama-gqa"), directory / "folded", folded)
    return {"coded": directory / "coded", "folded": directory / "folded"}


@pytest.fixture(params=["coded", "folded"])
def output(request: pytest.FixtureRequest, pristine: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(pristine[request.param], tmp_path / "out")
    return tmp_path / "out"


def refusal(directory: Path) -> str:
    with pytest.raises(KVCompressError) as error:
        kvcompress.load(directory)
    assert error.type is CheckpointError
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pristine_outputs_load(output: Path) -> None:
    assert kvcompress.load(output)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("name", [MAPS, "kv_plan.json"])
def test_missing_file(output: Path, name: str) -> None:
    (output / name).unlink()
    assert name in refusal(output)


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -50])
def test_truncated_maps(output: Path, n_bytes: int) -> None:
    (output / MAPS).write_bytes((output / MAPS).read_bytes()[:n_bytes])
    assert "truncated or damaged" in refusal(output)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_plan(output: Path, share: float) -> None:
    text = (output / "kv_plan.json").read_text()
    (output / "kv_plan.json").write_text(text[: int(share * len(text))])
    assert "kv_plan.json is damaged" in refusal(output)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


TENSOR_DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    **{f"no {part}": without(f"{KEY}.{part}") for part in ("blocks", "encoder", "decoder", "block", "bits")},
    "short encoder": replaced(f"{KEY}.encoder", lambda t: t[:-1]),
    "narrow maps": lambda ts: [
        replaced(f"{KEY}.{p}", lambda t: t[:, :-1])(ts) for p in ("encoder", "decoder", "blocks")
    ],
    "long decoder": replaced(f"{KEY}.decoder", lambda t: torch.cat([t, t])),
    "flat encoder": replaced(f"{KEY}.encoder", lambda t: t.flatten()),
    "block out of range": replaced(f"{KEY}.block", lambda t: t + 1000),
    "negative block": replaced(f"{KEY}.block", lambda t: t - 1000),
    "blocks that are no partition": replaced(f"{KEY}.blocks", torch.zeros_like),
    "fewer components than the plan says": lambda ts: [
        replaced(f"{KEY}.{p}", lambda t: t[:-1])(ts) for p in ("encoder", "decoder", "block", "bits")
    ],
    "short bits": replaced(f"{KEY}.bits", lambda t: t[:-1]),
    "unknown part": renamed(f"{KEY}.encoder", "layers.1.query.encoder"),
    "layer that is no number": renamed(f"{KEY}.encoder", "layers.one.key.encoder"),
    "name of another kind": renamed(f"{KEY}.encoder", "encoder"),
    "a stranger's tensor": lambda ts: ts.update({"a.b.c.d.encoder": torch.zeros(2)}),
    "NaN": replaced(f"{KEY}.decoder", lambda t: t * float("nan")),
    "infinity": replaced(f"{KEY}.encoder", lambda t: t / 0),
    "a whole site": lambda ts: [ts.pop(n) for n in list(ts) if n.startswith(KEY)],
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_damaged_maps(output: Path, damage: str) -> None:
    tensors = load_file(output / MAPS)
    TENSOR_DAMAGES[damage](tensors)
    save_file(tensors, output / MAPS, metadata={"format": "pt"})
    refusal(output)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t * float("nan")], ids=["short", "NaN"])
def test_damaged_mean(pristine: dict[str, Path], tmp_path: Path, change: Any) -> None:
    shutil.copytree(pristine["coded"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / MAPS)
    replaced(f"{KEY}.mean", change)(tensors)
    save_file(tensors, tmp_path / "out" / MAPS, metadata={"format": "pt"})
    refusal(tmp_path / "out")


def test_maps_of_another_plan(output: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    """Same model, another budget."""
    options = CompressOptions(metric="weights", keep=0.25, policy="uniform")
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "other", options)
    shutil.copy(tmp_path / "other" / MAPS, output / MAPS)
    refusal(output)


def test_plan_of_another_model(output: Path) -> None:
    document = json.loads((output / "kv_plan.json").read_text())
    (output / "kv_plan.json").write_text(json.dumps(document | {"architecture": "qwen2"}))
    assert "made for a qwen2 model" in refusal(output)


def test_truncated_weights(output: Path) -> None:
    weights = output / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refusal(output)


def test_missing_weights(output: Path) -> None:
    (output / "model.safetensors").unlink()
    refusal(output)


def test_a_directory_that_is_no_output(tiny_checkpoint: Any) -> None:
    assert "not an output of kvcompress" in refusal(tiny_checkpoint("llama-gqa"))


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere")
