"""The configurations that people run, in small: pattern of layers, ratios of heads and head sizes kept."""

from __future__ import annotations

from typing import Any

from tests.models.small import small_model

_FULL_OF_FOUR = ["linear_attention"] * 3 + ["full_attention"]
_WINDOWS_OF_SIX = ["sliding_attention"] * 5 + ["full_attention"]
#: name: (type, fields of its configuration, layers that are compressed)
REAL: dict[str, tuple[str, dict[str, Any], int]] = {
    # 40 layers, every fourth full, 16 query heads on 2 KV heads of 256, partial rotary, gated output, experts
    "Qwen3.6-35B-A3B": (
        "qwen3_5_moe_text",
        {"num_hidden_layers": 8, "layer_types": _FULL_OF_FOUR * 2, "num_attention_heads": 8}
        | {"num_key_value_heads": 1, "head_dim": 32},
        2,
    ),
    # windows, global layers of twice the head size, later layers read the cache of earlier ones
    "Gemma 4, small": (
        "gemma4_text",
        {"num_hidden_layers": 12, "layer_types": _WINDOWS_OF_SIX * 2, "num_attention_heads": 8}
        | {"num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 32, "num_kv_shared_layers": 6},
        1,
    ),
    # windows of many KV heads, global layers of fewer and wider ones whose keys are their values
    "Gemma 4, large": (
        "gemma4_text",
        {"num_hidden_layers": 12, "layer_types": _WINDOWS_OF_SIX * 2, "num_attention_heads": 8, "head_dim": 16}
        | {"num_key_value_heads": 4, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        | {"num_kv_shared_layers": 0},
        2,
    ),
    # every other layer a window, sinks as parameters, 8 query heads on each KV head, experts
    "gpt-oss-20b": (
        "gpt_oss",
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_attention_heads": 16}
        | {"num_key_value_heads": 2},
        2,
    ),
    # 8 query heads on each of 4 KV heads, key norms, every layer with experts
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 8, "head_dim": 16},
        4,
    ),
    # the latent and the part that turns, one dense layer before the experts
    "DeepSeek-V3": ("deepseek_v3", {"kv_lora_rank": 64, "qk_rope_head_dim": 8, "first_k_dense_replace": 1}, 4),
}


def real_small(name: str) -> Any:
    """Return the small model of one of REAL."""
    model_type, changes, _ = REAL[name]
    return small_model(model_type, **changes)
