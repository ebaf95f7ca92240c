"""A small random model of any causal-LM type that transformers knows, from its own configuration class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Before the files of models were as they are now: a type may not run, or keep other things in its cache.
EARLIER = Version(transformers.__version__) < Version("5.23")
VOCABULARY = 320
N_LAYERS = 4
#: Where every layer has a window, it is this: longer than what stays exact in the survey.
WINDOW = 64
#: Sizes under every name that a configuration may have for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), N_LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), N_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_latent_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim_swa"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 512),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers", "pad_token_id"), 0),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # far wider than a trained model's, so that the next token is not a tie
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
}
#: Latent attention: the sizes that belong together.
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
_LATENT_HEADS = {"num_key_value_heads": 4, "head_dim": 8}
_PICTURES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_SOUND = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2}
_BYTES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
_BYTES |= {"num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
_INDEXED = {"per_layer_config": {}, "head_dim": 32, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_CHOSEN = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
#: What single types need besides.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "blt": {
        **dict.fromkeys(("encoder_config", "decoder_config", "global_config", "patcher_config"), _BYTES),
        "encoder_hash_byte_group_vocab": 64,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 1},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _INDEXED),
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "git": {"vision_config": _PICTURES},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "phi4_multimodal": {"vision_config": _PICTURES, "audio_config": _SOUND},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _CHOSEN | {"indexer_compress_ratio": 4, "hc_lowrank": 16}),
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "nemotron_h": {"n_groups": 2},
}


def causal_types() -> list[str]:
    """Return every causal-LM type of the installed transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def needs(model_type: str) -> None:
    """Skip a test of a type that the installed transformers does not have."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def small_config(model_type: str, **changes: Any) -> Any:
    """Return the text configuration of a type in small sizes, its layer pattern kept as far as four layers show it."""
    base = CONFIG_MAPPING[model_type]()
    inner = base.get_text_config(decoder=True)
    target = base if type(inner) is type(base) else inner  # of flat encoder-decoders that is a copy with fields renamed
    names, aliases = target.to_dict(), getattr(type(target), "attribute_map", {})
    sizes = dict(_SIZES)
    if names.get("kv_lora_rank"):
        sizes |= _LATENT | _LATENT_HEADS
    sizes = {k: v for k, v in sizes.items() if k in names or k in aliases}
    for field in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(names.get(field), list) and names[field]:
            kinds = list(dict.fromkeys(names[field]))
            sizes[field] = (kinds * N_LAYERS)[:N_LAYERS]
    config = type(target)(**(sizes | _OF_TYPE.get(model_type, {}) | changes))
    if _has_windows_alone(config):  # then they are compressed
        for name in {"sliding_window", "attention_window_size"} & set(config.to_dict()):
            setattr(config, name, WINDOW)
    return config


def _has_windows_alone(config: Any) -> bool:
    """Return whether every layer that attends has a sliding window, as far as transformers knows their kinds."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError):  # kinds that the model's own file defines
        return False
    kinds = [layer.is_sliding for layer in layers if hasattr(layer, "is_sliding")]
    return bool(kinds) and all(kinds)


def small_model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a seeded float32 model of a type. Raises ValueError where its small configuration is too large."""
    config = small_config(model_type, **changes)
    torch.manual_seed(seed)
    with torch.device("meta"):
        size = sum(p.numel() for p in _made(model_type, config).parameters())
    if size > 4e7:
        raise ValueError(f"the small configuration of {model_type} still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    return _made(model_type, config, dtype=torch.float32).eval()


def _made(model_type: str, config: Any, **options: Any) -> Any:
    """Return a type's model. Of some, the text configuration alone is no key for transformers' own choice of class."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(config, **options)
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])._from_config(config, **options)
