"""What the plugin of vLLM refuses is found in a model's configuration, in the names of its weights and in a layer's own
words, all without vLLM."""

from __future__ import annotations

from typing import Any

import pytest

from kvcompress.errors import OptionError
from kvcompress.model.model_spec import OwnLayer
from kvcompress.vllm.refusals import of_config, of_layer, of_tensors, refuse

PLAIN = {"alibi_slopes": None, "sliding_window": None, "logits_soft_cap": None, "attn_type": "decoder"}
NOTHING: dict[str, Any] = PLAIN | {"shares": None, "sinks": None}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"attn_logit_softcapping": 50.0}, "soft cap"),
        ({"num_kv_shared_layers": 10}, "the cache of others"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "mpt"}, "ALiBi"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
    ],
)
def test_a_configuration_tells(config: dict[str, Any], found: str) -> None:
    assert found in str(of_config(config))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "kv_lora_rank": None, "attn_logit_softcapping": None, "num_kv_shared_layers": 0},
        {"model_type": "falcon", "alibi": False},
        {"model_type": "mpt", "attn_config": {"alibi": False}},
    ],
)
def test_others_are_not_refused(config: dict[str, Any]) -> None:
    assert of_config(config, [OwnLayer(1, "DynamicSlidingWindowLayer", window=512, numbers=64)]) is None


def test_layers_beside_compressed_ones_may_only_be_windows() -> None:
    for own in (
        OwnLayer(9, "LinearAttentionLayer", state_bytes=1000),
        OwnLayer(9, "DynamicLayer"),
        OwnLayer(9, "DynamicSlidingWindowLayer", window=512, state_bytes=8),
    ):
        assert f"(layer 9: {own.kind})" in str(of_config({}, [own]))
    assert "sliding window" in str(of_config({}, window=4096))


@pytest.mark.parametrize("name", ["sinks", "attention_sink_bias", "softmax_offset", "sink_proj.weight"])
def test_learned_sinks_of_compressed_layers_are_seen_by_their_weights(name: str) -> None:
    names = ["model.embed_tokens.weight", f"model.layers.5.self_attn.{name}"]
    assert of_tensors(names, {0, 5}) == "learned sinks"
    assert of_tensors(names, {0, 4}) is None  # a window's are the engine's own
    assert of_tensors(["model.layers.5.self_attn.k_proj.weight"], {5}) is None


@pytest.mark.parametrize(
    ("word", "value", "found"),
    [
        ("alibi_slopes", [0.5], "ALiBi"),
        ("sliding_window", 512, "sliding window"),
        ("logits_soft_cap", 50.0, "soft cap"),
        ("attn_type", "encoder", "attention of type encoder"),
        ("shares", "model.layers.3.self_attn.attn", "the cache of others"),
        ("sinks", object(), "learned sinks"),
    ],
)
def test_a_layer_tells(word: str, value: Any, found: str) -> None:
    assert of_layer(**NOTHING) is None
    assert found in str(of_layer(**NOTHING | {word: value}))


def test_a_refusal_names_what_and_says_what_to_do() -> None:
    refuse(None, "")
    with pytest.raises(OptionError, match=r"^with ALiBi a compressed cache .* not in vLLM\. Leave out --for\.$"):
        refuse("ALiBi", "Leave out --for.")
