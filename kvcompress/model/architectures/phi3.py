"""Phi-3 and Phi-4-mini: one fused qkv_proj; partial rotary in the later ones."""

from typing import Any

from kvcompress.model.config_fields import head_counts, positive_int, rotary_dim
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, Projection
from kvcompress.model.projections import build_model_spec


def read(config: dict[str, Any]) -> ModelSpec:
    n_heads, n_kv_heads, head_dim = head_counts(config)
    width = n_kv_heads * head_dim
    key_start = n_heads * head_dim
    layers = []
    for i in range(positive_int(config, "num_hidden_layers")):
        module = f"model.layers.{i}.self_attn.qkv_proj"
        key, value = (
            Projection(weight=f"{module}.weight", bias=None, module=module, start=start, stop=start + width)
            for start in (key_start, key_start + width)
        )
        layers.append(
            AttentionSpec(
                layer=i,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_dim=head_dim,
                rotary_dim=rotary_dim(config, head_dim),
                key=key,
                value=value,
                sliding_window=config.get("sliding_window"),
            )
        )
    return build_model_spec(config, layers)
