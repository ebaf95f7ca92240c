"""Quantised weights: they are compressed and run as they are, and maps of the 16-bit model attach to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress
from kvcompress.errors import CheckpointError
from kvcompress.evaluate.perplexity import evaluate
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def options(text_file: Path) -> CompressOptions:
    return CompressOptions(keep=0.25, calibration=(str(text_file),), tokens=512, seq_len=128, recent=16)


@pytest.fixture
def quantised(tiny_checkpoint: Any, tmp_path: Path) -> Path:
    """A directory with int8 weights of torchao, made from the tiny bf16 llama."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    source = tiny_checkpoint("llama-bf16")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    for file in source.glob("*token*"):
        (tmp_path / "int8").mkdir(exist_ok=True)
        (tmp_path / "int8" / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def test_quantised_weights_are_compressed_and_run(
    quantised: Path, options: CompressOptions, tiny_checkpoint: Any, tmp_path: Path, text_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    plan = compress(quantised, tmp_path / "own", options, device="cpu").plan
    assert plan.keep <= 0.25 and plan.dtype == "bfloat16"
    model = kvcompress.load(tmp_path / "own", dtype=torch.bfloat16)
    own = evaluate(model, tokenizer, str(text_file), seq_len=128, max_windows=2).perplexity["ratio"]
    compress(tiny_checkpoint("llama-bf16"), tmp_path / "bf16", options, device="cpu")
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
