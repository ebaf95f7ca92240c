"""config.json -> ModelSpec: both spellings of every field, and refusals with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress.errors import CheckpointError, KVCompressError, UnsupportedModelError
from kvcompress.model import architectures
from kvcompress.model.architectures import FAMILIES as READERS
from kvcompress.model.architectures import is_read, read_model_spec
from kvcompress.model.model_spec import ModelSpec, Site
from tests.tiny_models import FAMILIES

#: The config.json of a 2-layer llama as transformers 4 wrote it.
OLD = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}


def read(**changes: Any) -> ModelSpec:
    """Read OLD with changes; a change to the string 'absent' removes the field."""
    return read_model_spec({k: v for k, v in {**OLD, **changes}.items() if v != "absent"})


def test_sizes() -> None:
    spec = read()
    assert (spec.architecture, spec.dtype, spec.hidden_size, spec.vocab_size) == ("llama", "bfloat16", 64, 100)
    assert spec.tied_embeddings
    assert [a.layer for a in spec.layers] == [0, 1]
    attention = spec.layers[1]
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim, attention.rotary_dim) == (8, 4, 8, 8)
    assert attention.width == 32
    assert attention.key.weight == "model.layers.1.self_attn.k_proj.weight" and attention.key.bias is None
    assert attention.value.module == "model.layers.1.self_attn.v_proj"
    assert spec.sites == (Site(0, "key"), Site(0, "value"), Site(1, "key"), Site(1, "value"))
    assert spec.cache_numbers_per_token == 128 and spec.cache_bytes_per_token == 256


@pytest.mark.parametrize("spelling", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_dtype_spellings(spelling: dict[str, str]) -> None:
    assert read(**{"torch_dtype": "absent"} | spelling).dtype == "float16"


def test_dtype_wins_over_torch_dtype_and_float32_is_the_default() -> None:
    assert read(dtype="float32").dtype == "float32"
    assert read(torch_dtype="absent").dtype == "float32"


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("spelling", ["rope_scaling type", "rope_scaling rope_type", "rope_parameters"])
def test_rope_spellings(kind: str, spelling: str) -> None:
    field, _, name = spelling.partition(" ")
    assert read(**{field: {name or "rope_type": kind, "factor": 2.0}}).layers[0].rotary_dim == 8


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "su"])
@pytest.mark.parametrize("spelling", ["rope_scaling type", "rope_parameters rope_type"])
def test_length_dependent_rope_is_refused(kind: str, spelling: str) -> None:
    field, _, name = spelling.partition(" ")
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' changes its frequencies"):
        read(**{field: {name: kind, "factor": 2.0}})


PARTIAL = {"partial_rotary_factor": 0.5}


@pytest.mark.parametrize("where", [PARTIAL, {"rope_parameters": {"rope_type": "default", **PARTIAL}}])
def test_partial_rotary_spellings(where: dict[str, Any]) -> None:
    assert read(model_type="phi3", **where).layers[0].rotary_dim == 4


def test_missing_counts_have_the_defaults_of_transformers() -> None:
    attention = read(num_key_value_heads="absent").layers[0]
    assert attention.n_kv_heads == 8 and attention.head_dim == 8
    assert read(head_dim=16).layers[0].head_dim == 16


def test_qwen_biases_and_key_norms() -> None:
    qwen2 = read(model_type="qwen2").layers[0]
    assert qwen2.key.bias == "model.layers.0.self_attn.k_proj.bias" and not qwen2.key_norm
    qwen3 = read(model_type="qwen3").layers[0]
    assert qwen3.key.module == "model.layers.0.self_attn.k_norm" and qwen3.key.bias is None and qwen3.key_norm
    assert qwen3.value.module == "model.layers.0.self_attn.v_proj"
    assert read(attention_bias=True).layers[0].value.bias == "model.layers.0.self_attn.v_proj.bias"


def test_phi3_slices_the_fused_projection() -> None:
    attention = read(model_type="phi3").layers[0]
    assert (attention.key.start, attention.key.stop, attention.value.start, attention.value.stop) == (64, 96, 96, 128)
    assert attention.key.weight == attention.value.weight == "model.layers.0.self_attn.qkv_proj.weight"


def test_smollm3_layers_without_rope() -> None:
    layers = read(model_type="smollm3", num_hidden_layers=8).layers
    assert [a.rotary_dim for a in layers] == [8, 8, 8, 0, 8, 8, 8, 0]
    given = read(model_type="smollm3", no_rope_layers=[0, 1]).layers
    assert [a.rotary_dim for a in given] == [0, 8]


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, [16, 16]),
        ({"model_type": "mistral", "sliding_window": None}, [None, None]),
        ({"model_type": "phi3", "sliding_window": 16}, [16, 16]),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, [None, None]),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, [None, 16]),
        (
            {"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            [16, None],
        ),
    ],
    ids=str,
)
def test_sliding_windows(fields: dict[str, Any], windows: list[int | None]) -> None:
    """Windows beside full layers are the model's own; where there is nothing else, they are what is compressed."""
    spec = read(**fields)
    found = {a.layer: a.sliding_window for a in spec.layers} | {o.layer: o.window for o in spec.own_layers}
    assert [found[i] for i in range(2)] == windows
    assert len(spec.own_layers) == (windows.count(16) if None in windows else 0)
    assert all(o.numbers == 2 * spec.layers[0].width for o in spec.own_layers)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "deepseek_v3", "kimi_k2", "gemma3_text", "mixtral", None, 7])
def test_other_families_have_no_reader(model_type: Any) -> None:
    assert not is_read({**OLD, "model_type": model_type})
    with pytest.raises(
        UnsupportedModelError, match=f"model type '{model_type}'.* one of {', '.join(READERS)}"
    ) as error:
        read(model_type=model_type)
    assert "\n" not in str(error.value)


def test_quantised_weights_say_nothing_of_projections() -> None:
    assert is_read(OLD) and not is_read({**OLD, "quantization_config": {"quant_method": "gptq", "bits": 4}})


BROKEN = {
    "KV heads do not divide": ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value"),
    "heads do not divide": ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 64 is not a multiple"),
    "no heads": ({"num_attention_heads": "absent"}, "num_attention_heads must be a positive integer, found None"),
    "heads as text": ({"num_attention_heads": "8"}, "num_attention_heads must be a positive integer, found '8'"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
    "negative head_dim": ({"head_dim": -8}, "head_dim must be a positive integer"),
    "true": ({"hidden_size": True}, "hidden_size must be a positive integer"),
    "unknown dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn is not supported"),
    "odd head_dim": ({"head_dim": 7}, "head_dim"),
    "rope_scaling as text": ({"rope_scaling": "linear"}, "rope"),
    "rope per layer type": ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope"),
    "partial rotary as text": ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    "partial rotary above one": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    "short no_rope_layers": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
    "short layer_types": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
        "layer_types",
    ),
    "quantization_config as text": ({"quantization_config": "int8"}, "quanti[sz]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_configs_name_the_field(name: str) -> None:
    changes, reason = BROKEN[name]
    with pytest.raises(KVCompressError, match=reason) as error:
        read(**changes)
    assert isinstance(error.value, CheckpointError | UnsupportedModelError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_fit_the_models_that_transformers_builds(tiny_checkpoint: Any, tiny_model: Any, family: str) -> None:
    """Every module and tensor that a spec names is there, with the sizes that it says."""
    spec = read_model_spec(json.loads((Path(tiny_checkpoint(family)) / "config.json").read_text()))
    model = tiny_model(family)
    state = model.state_dict()
    for attention in spec.layers:
        for part in ("key", "value"):
            projection = attention.projection(part)
            assert projection.stop - projection.start == attention.width
            assert state[projection.weight].shape[1] == spec.hidden_size
            assert state[projection.weight].shape[0] >= projection.stop
            assert (projection.bias is None) == (projection.weight.replace("weight", "bias") not in state)
            model.get_submodule(projection.module)
        module = model.get_submodule(attention.value.module.rpartition(".")[0])
        assert (attention.rotary_dim > 0) == getattr(module, "use_rope", True)
        assert attention.sliding_window == model.config.to_dict().get("sliding_window")
    if any(a.rotary_dim for a in spec.layers):
        assert 2 * len(model.get_decoder().rotary_emb.inv_freq) == max(a.rotary_dim for a in spec.layers)
    cache = model(torch.tensor([[5, 6, 7]])).past_key_values
    whole = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    assert whole == 3 * 4 * spec.cache_numbers_per_token


@pytest.mark.parametrize("family", READERS)
def test_a_family_is_a_short_file(family: str) -> None:
    """What running a model shows is not read: a reader says which weights make keys and values, and no more."""
    file = Path(architectures.__file__).with_name(f"{family}.py")
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40
