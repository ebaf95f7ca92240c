"""The checkpoint reader: lazy, exact, and the same for one file or many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config

from kvcompress.checkpoint.reader import open_checkpoint, open_headers
from kvcompress.errors import CheckpointError
from kvcompress.model.model_spec import Site
from kvcompress.model.probe import NotRun


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.mark.parametrize("family", ["llama-gqa", "llama-sharded", "llama-tied", "llama-bf16", "phi3"])
def test_headers_tell_every_tensor(tiny_checkpoint: Any, family: str) -> None:
    directory = tiny_checkpoint(family)
    tensors = all_tensors(directory)
    with open_checkpoint(directory) as checkpoint:
        assert {n: e.shape for n, e in checkpoint.tensors.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
        assert checkpoint.weight_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
        assert checkpoint.spec.dtype == DTYPES[tensors["model.norm.weight"].dtype]


@pytest.mark.parametrize("family", ["llama-sharded", "llama-bias", "qwen2", "phi3", "llama-bf16"])
def test_site_weights_are_the_rows_of_the_projections(tiny_checkpoint: Any, tiny_model: Any, family: str) -> None:
    """k and v of the model's own modules, fused or not, in float64."""
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    model = tiny_model(family)
    with open_checkpoint(tiny_checkpoint(family)) as checkpoint:
        for site in checkpoint.spec.sites:
            projection = checkpoint.spec.attention(site).projection(site.part)
            expected = model.get_submodule(projection.module)(x)[:, projection.start : projection.stop]
            weight, bias = checkpoint.site_weight(site)
            assert weight.dtype == torch.float64 and (bias is None) == (projection.bias is None)
            ours = x.double() @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)


def test_rows_are_read_alone(tiny_checkpoint: Any) -> None:
    directory = tiny_checkpoint("llama-gqa")
    name = "model.layers.1.mlp.gate_proj.weight"
    with open_checkpoint(directory) as checkpoint:
        assert torch.equal(checkpoint.rows(name, 3, 7), all_tensors(directory)[name][3:7])
        assert torch.equal(checkpoint.rows(name), all_tensors(directory)[name])


def test_the_tensors_dtype_wins_over_the_configs(tiny_checkpoint: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint("llama-bf16"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.spec.dtype == "bfloat16"


def test_fingerprints(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """The same for a copy, another for other weights or another config."""
    original = tiny_checkpoint("llama-gqa")
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)

    def fingerprint(directory: Path) -> str:
        with open_checkpoint(directory) as checkpoint:
            return checkpoint.fingerprint()

    first = fingerprint(original)
    assert first == fingerprint(copy) and len(first) == 64
    assert first != fingerprint(tiny_checkpoint("llama-gqa", seed=1))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    changed = fingerprint(copy)
    assert changed != first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert fingerprint(copy) != changed


@pytest.mark.parametrize("source", ["nothing-here", "./nothing", "/no/such/directory", "a/b/c"])
def test_sources_that_are_nothing(source: str) -> None:
    with pytest.raises(CheckpointError, match="neither a directory"), open_checkpoint(source):
        pass


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nretry later")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as error, open_checkpoint("a/b"):
        pass
    assert str(error.value).endswith("could not be fetched from the hub: no route to host")


def test_a_hub_id_is_fetched_without_pickles(tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(source: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.update(source=source, patterns=allow_patterns)
        return str(tiny_checkpoint("llama-gqa"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with open_checkpoint("org/tiny") as checkpoint:
        assert checkpoint.source == "org/tiny"
    assert asked["source"] == "org/tiny" and not any("bin" in p or "pt" in p for p in asked["patterns"])


def test_site_names() -> None:
    assert str(Site(3, "value")) == "layers.3.value"


def test_a_hub_repository_is_fetched_without_second_copies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mistral's repositories hold every weight twice."""
    from huggingface_hub.utils import filter_repo_objects

    repository = ["config.json", "model-1.safetensors", "consolidated.safetensors", "original/a.safetensors", "x.pth"]
    repository += ["tokenizer.json", "chat_template.jinja"]
    fetched: list[str] = []

    def snapshot_download(name: str, **patterns: Any) -> str:
        fetched.extend(filter_repo_objects(repository, **patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError), open_checkpoint("org/model"):
        pass
    assert fetched == ["config.json", "model-1.safetensors", "tokenizer.json", "chat_template.jinja"]


@pytest.mark.parametrize("family", ["gemma2", "llama-gqa"])
def test_headers_of_the_hub_are_read_with_the_config_beside_them(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Also of a family that is read by running it, wherever the command is called; no weights are there."""
    if family == "gemma2" and not runs_without_weights():
        pytest.skip("this transformers runs no such model on the meta device")
    source = small_gemma(tmp_path / "source") if family == "gemma2" else tiny_checkpoint(family)
    cached = tmp_path / "cached"
    cached.mkdir()
    shutil.copy(source / "config.json", cached)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tiny_checkpoint("qwen3") / "config.json", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _id, name: str(cached / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _id: hub_metadata(source))
    with open_headers("org/name") as far, open_checkpoint(source) as near:
        assert far.source == "org/name"
        assert (far.spec, far.tensors) == (near.spec, near.tensors)


def test_headers_of_a_model_that_does_not_run_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_gemma(tmp_path / "source")
    (tmp_path / "cached").mkdir()
    shutil.copy(source / "config.json", tmp_path / "cached")

    def refuse(*_: object, **__: object) -> None:
        raise NotRun("it needs real numbers")

    monkeypatch.setattr("kvcompress.model.probe.probe", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _id, name: str(tmp_path / "cached" / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _id: hub_metadata(source))
    with pytest.raises(CheckpointError, match="Download the checkpoint"), open_headers("org/name"):
        pass


def test_a_config_of_the_hub_that_asks_for_too_much_is_refused(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint("llama-gqa")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gemma2", "num_hidden_layers": 9000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _id, name: str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda _id: hub_metadata(source))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 9,000"), open_headers("org/name"):
        pass


def small_gemma(directory: Path) -> Path:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**fields, num_key_value_heads=2, head_dim=8, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def runs_without_weights() -> bool:
    from transformers.utils import generic

    if hasattr(generic, "maybe_autocast"):
        try:
            generic.maybe_autocast(device_type="meta", enabled=False)
        except RuntimeError:
            return False
    return True


def hub_metadata(source: Path) -> SafetensorsRepoMetadata:
    """Return what the hub tells of the weights of a directory."""
    headers = {}
    for name, tensor in all_tensors(source).items():
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        headers[name] = TensorInfo(dtype=dtype, shape=list(tensor.shape), data_offsets=(0, tensor.nbytes))
    file = SafetensorsFileMetadata(metadata={}, tensors=headers)
    return SafetensorsRepoMetadata(
        metadata=None,
        sharded=False,
        weight_map=dict.fromkeys(headers, "model.safetensors"),
        files_metadata={"model.safetensors": file},
    )
