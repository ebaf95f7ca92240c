"""Quantised weights: they are compressed and run as they are, and maps of the 16-bit model attach to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress
from kvcompress import compat
from kvcompress.checkpoint.headers import read_headers
from kvcompress.errors import AttachmentError, CheckpointError
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def options(text_file: Path) -> CompressOptions:
    return CompressOptions(keep=0.25, calibration=(str(text_file),), tokens=512, seq_len=128, recent=16)


def torchao_int8(source: Path, target: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(target)


def compressed_tensors_int8(source: Path, target: Path) -> None:
    """int8 weights, a scale for each row, packed as llm-compressor packs them."""
    compressed_tensors(source, target, "int", 127)


def compressed_tensors_fp8(source: Path, target: Path) -> None:
    """8-bit floats, weights and what comes in to them, as most FP8 models of the hub: a scale a row and a token."""
    compressed_tensors(source, target, "float", 448, incoming={"strategy": "token", "dynamic": True})


def compressed_tensors(
    source: Path, target: Path, kind: str, largest: int, *, incoming: dict[str, Any] | None = None
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = QuantizationArgs(**eight, strategy="channel")
    activations = None if incoming is None else QuantizationArgs(**eight, **incoming)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight.data.float().abs().amax(1, keepdim=True) / largest
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    packing = ModelCompressor.from_pretrained_model(model)
    packing.compress_model(model)
    model.save_pretrained(target)
    packing.update_config(target)


@pytest.mark.parametrize("write", [torchao_int8, compressed_tensors_int8, compressed_tensors_fp8])
def test_quantised_weights_are_compressed_and_run(
    write: Callable[[Path, Path], None], options: CompressOptions, tiny_checkpoint: Any, tmp_path: Path, text_file: Path
) -> None:
    source, quantised = tiny_checkpoint("llama-bf16"), tmp_path / "quantised"
    write(source, quantised)
    for file in source.glob("*token*"):
        (quantised / file.name).write_bytes(file.read_bytes())
    weights = {name: entry.dtype for name, entry in read_headers(quantised).items() if "v_proj" in name}
    assert {"I8", "I32", "F8_E4M3"} & set(weights.values()), weights
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    plan = compress(quantised, tmp_path / "own", options, device="cpu").plan
    assert plan.keep <= 0.25 and plan.dtype == "bfloat16"
    model = kvcompress.load(tmp_path / "own", dtype=torch.bfloat16)
    own = evaluate(model, tokenizer, str(text_file), seq_len=128, max_windows=2).perplexity["ratio"]
    compress(source, tmp_path / "bf16", options, device="cpu")
    kvcompress.attach(model, tmp_path / "bf16")
    relative = evaluate(model, tokenizer, str(text_file), seq_len=128, max_windows=2).perplexity["ratio"]
    assert relative == pytest.approx(own, rel=0.1)


def test_a_stranger_of_the_same_sizes_is_refused(
    tiny_checkpoint: Any, options: CompressOptions, tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama-gqa")
    compress(source, tmp_path / "out", options, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(source)
    kvcompress.attach(model, tmp_path / "out")
    for name, parameter in model.named_parameters():
        if "v_proj" in name or "embed" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.normal_(0, 0.3, generator=generator)
    with pytest.raises(CheckpointError, match="the model is no relative of the one"):
        kvcompress.attach(model, tmp_path / "out")


def test_another_theta_is_refused(tiny_checkpoint: Any, options: CompressOptions, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama-gqa")
    compress(source, tmp_path / "out", options, device="cpu")
    other = {"rope_type": "default", "rope_theta": 500.0}
    model = AutoModelForCausalLM.from_pretrained(source, rope_parameters=other)
    with pytest.raises(CheckpointError, match=r"turns layers.0.key with the position in another way"):
        kvcompress.attach(model, tmp_path / "out")


def test_attention_that_means_something_else_is_refused(
    tiny_checkpoint: Any, options: CompressOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention of a model's own file may take what our masks do not say: its logits are others then, which is seen."""
    source = tiny_checkpoint("llama-gqa")
    compress(source, tmp_path / "out", options, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    kvcompress.attach(model, tmp_path / "out")
    kvcompress.detach(model)
    exact = compat.exact_attention
    monkeypatch.setattr(compat, "exact_attention", lambda *args, **kwargs: 1.1 * exact(*args, **kwargs))
    with pytest.raises(AttachmentError, match="has other logits with a cache attached"):
        kvcompress.attach(model, tmp_path / "out")
    assert "kvcompress_attachment" not in model.__dict__
