"""What vLLM cannot run compressed is refused with the reason, and never run uncompressed in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import KVCompressError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.vllm import plugin
from tests.tiny_models import save_tiny_checkpoint
from tests.vllm.conftest import SIZES, generate, greedy, new_tokens, prompts


def test_another_model_s_maps(compressed: Callable[..., Path], engine: Any, tmp_path: Path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", "llama-gqa", **(SIZES | {"num_hidden_layers": 2}))
    with pytest.raises(KVCompressError, match="3 layers"):
        engine(other, additional_config={"kvcompress": str(compressed(keep=0.25))})


def test_a_folded_checkpoint(source: Path, engine: Any, tmp_path: Path) -> None:
    options = CompressOptions(keep=0.5, folded=True, key_basis="head", metric="weights", recent=0)
    compress(source, tmp_path / "folded", options)
    with pytest.raises(KVCompressError, match="--to hf"):
        engine(tmp_path / "folded")


def test_a_quantised_cache_beside_ours(compressed: Callable[..., Path], engine: Any) -> None:
    with pytest.raises(KVCompressError, match="kv-cache-dtype"):
        engine(compressed(keep=0.25), kv_cache_dtype="fp8")


def test_another_version(compressed: Callable[..., Path], engine: Any, monkeypatch: Any, plain: Any) -> None:
    from vllm.model_executor.layers.attention import Attention

    monkeypatch.setattr(Attention, "__init__", Attention.__init__)  # put back when the test is over
    plugin._refuse_compressed("vllm 0.99.0 is installed, and kvcompress knows vLLM 0.32.x alone.")
    with pytest.raises(KVCompressError, match=r"0\.99\.0"):
        engine(compressed(keep=0.25))


def test_off_runs_the_uncompressed_model(compressed: Callable[..., Path], engine: Any, plain: Any) -> None:
    ids = prompts(100)
    llm = engine(compressed(keep=0.125, turn=256), additional_config={"kvcompress": "off"})
    assert new_tokens(generate(llm, ids, 20)) == [greedy(plain, x, 20) for x in ids]
