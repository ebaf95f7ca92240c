"""Quantised weights: they are compressed and run as they are, and maps of the 16-bit model attach to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress
from kvcompress import compat
from kvcompress.checkpoint.headers import read_headers
from kvcompress.errors import AttachmentError, CheckpointError
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.runtime.attach import attachment_of
from tests.models.small import needs, small_model
from tests.packed_linear import Packed
from tests.tiny_models import build_tokenizer

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
    check_both(source, quantised, options, tmp_path, text_file)


def check_both(source: Path, quantised: Path, options: CompressOptions, directory: Path, text: Path) -> None:
    """A quantised checkpoint is compressed and run, and maps of the 16-bit one serve it about as well."""
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    plan = compress(quantised, directory / "own", options, device="cpu").plan
    assert plan.keep <= 0.25 and plan.dtype == "bfloat16"
    model = kvcompress.load(directory / "own", dtype=torch.bfloat16)
    own = evaluate(model, tokenizer, str(text), seq_len=128, max_windows=2).perplexity["ratio"]
    compress(source, directory / "bf16", options, device="cpu")
    kvcompress.attach(model, directory / "bf16")
    relative = evaluate(model, tokenizer, str(text), seq_len=128, max_windows=2).perplexity["ratio"]
    assert relative == pytest.approx(own, rel=0.1)


def in_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return 4-bit floats, two a byte, and a power of two for each 32: [..., n / 32, 16] and [..., n / 32], uint8."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = weights.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).clamp_min(2.0**-126).log2().ceil()
    scaled = groups / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - levels).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8), (exponents + 127).to(torch.uint8)


def test_mxfp4_weights_are_compressed_and_run(options: CompressOptions, tmp_path: Path, text_file: Path) -> None:
    """As gpt-oss is published: experts in MXFP4, the rest in bfloat16. In 16 bits another expert is a rounding away."""
    needs("gpt_oss")
    source, quantised = tmp_path / "source", tmp_path / "quantised"
    small_model("gpt_oss").to(torch.bfloat16).save_pretrained(source)
    quantised.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = in_mxfp4(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (quantised / "config.json").write_text(json.dumps(config))
    for directory in (source, quantised):
        build_tokenizer().save_pretrained(directory)
    check_both(source, quantised, options, tmp_path, text_file)


def test_packed_weights_are_attached_to(tiny_checkpoint: Any, options: CompressOptions, tmp_path: Path) -> None:
    """Attention whose weights are buffers of integers, as AWQ's and GPTQ's kernels have them."""
    source = tiny_checkpoint("llama-gqa")
    compress(source, tmp_path / "out", options, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(source)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
        assert not list(layer.self_attn.parameters())
    ids = torch.arange(3, 80)[None]
    own = model(ids).logits
    kvcompress.attach(model, tmp_path / "out")
    cache = attachment_of(model).new_cache()
    with torch.no_grad():
        found = model(ids, use_cache=True, past_key_values=cache).logits
    assert (found - own).norm() < 0.3 * own.norm() and cache.nbytes() > 0


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
