"""Layers with a sliding window beside compressed ones, as Gemma 3 has them: vLLM keeps their cache itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from tests.tiny_models import VOCABULARY, build_tokenizer, prose
from tests.vllm.conftest import check_twice, prompts

N_NEW, WINDOW = 40, 48
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3, whose two kinds of layers have RoPE of their own."""
    directory = tmp_path_factory.mktemp("gemma")
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=WINDOW, layer_types=LAYERS,
        max_position_embeddings=2048, initializer_range=0.2, dtype="float32", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).eval().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def compressed_gemma(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma-compressed")
    (root / "text.txt").write_text(prose(5000, seed=1), encoding="utf-8")
    options = CompressOptions(keep=0.25, calibration=(str(root / "text.txt"),), tokens=2048, seq_len=256)
    compress(gemma, root / "out", options)
    return root / "out"


def test_the_same_tokens_as_the_run_time(compressed_gemma: Path, engine: Any, run_time: Any) -> None:
    check_twice(engine(compressed_gemma), run_time(compressed_gemma), prompts(300, 70, 1, 97, 33), N_NEW)


def test_the_log_counts_what_the_windows_take(compressed_gemma: Path, engine: Any, monkeypatch: Any) -> None:
    from kvcompress.vllm import summary

    lines: list[str] = []
    monkeypatch.setattr(summary._logger, "info", lambda form, line: lines.append(line))
    engine(compressed_gemma)
    assert len(lines) == 1 and "4 layers keep a sliding window" in lines[0]
