"""What vLLM cannot run compressed is refused with the reason, and never run uncompressed in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from kvcompress.errors import KVCompressError
from kvcompress.model.model_spec import OwnLayer
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import Plan
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


def test_a_model_that_turns_its_keys_otherwise(compressed: Callable[..., Path]) -> None:
    from kvcompress.vllm.layers import rotaries, same_turn

    plan, config = Plan.load(directory := compressed(keep=0.25)), AutoConfig.from_pretrained(directory)
    turning = rotaries(plan, config)
    assert sorted(turning) == [0, 1, 2]
    # An output of before the plan said how keys turn has the model's own RoPE.
    earlier = rotaries(replace(plan, rotations=(), sites=tuple(replace(s, rotation=None) for s in plan.sites)), config)
    assert all(same_turn(turning[layer], earlier[layer]) for layer in turning)
    config.rope_parameters = config.rope_parameters | {"rope_theta": 5e5}
    with pytest.raises(KVCompressError, match="another way"):
        rotaries(plan, config)


def test_layers_with_a_state(compressed: Callable[..., Path]) -> None:
    from kvcompress.vllm.layers import rotaries

    plan, config = Plan.load(directory := compressed(keep=0.25)), AutoConfig.from_pretrained(directory)
    hybrid = replace(plan, own_layers=(OwnLayer(9, "LinearAttentionLayer", state_bytes=1000),))
    with pytest.raises(KVCompressError, match="layer 9: LinearAttentionLayer"):
        rotaries(hybrid, config)


def test_latent_attention(monkeypatch: Any) -> None:
    from kvcompress.vllm import hooks

    made: list[Any] = []
    found: list[Any] = [None, SimpleNamespace(directory="OUT")]
    monkeypatch.setattr(hooks, "get_current_vllm_config", lambda: None)
    monkeypatch.setattr(hooks, "source_of", lambda config: found.pop(0))
    hooks._refuse_latent(lambda *a: made.append(a), "layer")  # an ordinary model's
    assert made == [("layer",)]
    with pytest.raises(KVCompressError, match=r"MLA.*off"):
        hooks._refuse_latent(lambda *a: made.append(a), "layer")


@pytest.mark.parametrize(
    ("asked", "why"),
    [({"alibi_slopes": [0.5]}, "ALiBi"), ({"logits_soft_cap": 50.0}, "soft cap"), ({"sinks": 1}, "learned sinks")],
)
def test_a_layer_that_attends_otherwise(asked: dict[str, Any], why: str) -> None:
    from kvcompress.vllm.attention import PackedAttention

    PackedAttention(2, 16, 0.25, 1)
    with pytest.raises(KVCompressError, match=rf"{why}.*off"):
        PackedAttention(2, 16, 0.25, 1, **asked)


def test_a_model_that_is_refused_by_its_configuration(compressed: Callable[..., Path]) -> None:
    from kvcompress.vllm.layers import rotaries

    plan, config = Plan.load(directory := compressed(keep=0.25)), AutoConfig.from_pretrained(directory)
    config.num_kv_shared_layers = 1
    with pytest.raises(KVCompressError, match="the cache of others"):
        rotaries(plan, config)
