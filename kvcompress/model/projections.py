"""ModelSpec of the families whose weights name a layer's projections as llama's do."""

from __future__ import annotations

from typing import Any

from kvcompress.model.config_fields import head_counts, positive_int, rotary_dim, storage_dtype
from kvcompress.model.model_spec import AttentionSpec, ModelSpec, OwnLayer, Projection


def build_model_spec(config: dict[str, Any], layers: list[AttentionSpec]) -> ModelSpec:
    """Return the model of some layers: those with a sliding window stay its own, unless all have one."""
    sliding = [a for a in layers if a.sliding_window]
    if len(sliding) == len(layers):  # nothing but windows: then they are what there is to compress
        sliding = []
    return ModelSpec(
        architecture=config["model_type"],
        dtype=storage_dtype(config),
        hidden_size=positive_int(config, "hidden_size"),
        vocab_size=positive_int(config, "vocab_size"),
        layers=tuple(a for a in layers if a not in sliding),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        own_layers=tuple(
            OwnLayer(a.layer, "DynamicSlidingWindowLayer", a.sliding_window, 2 * a.width) for a in sliding
        ),
    )


def separate_projections(
    config: dict[str, Any],
    *,
    bias: bool = False,
    key_norm: bool = False,
    rotary_layers: list[bool] | None = None,
    sliding_layers: list[bool] | None = None,
) -> ModelSpec:
    """Return the spec of a model with llama's tensor names: self_attn.{k,v}_proj, RoPE in half-split pairs."""
    n_heads, n_kv_heads, head_dim = head_counts(config)
    n_layers = positive_int(config, "num_hidden_layers")
    width = n_kv_heads * head_dim
    rotary = rotary_dim(config, head_dim)
    layers = []
    for i in range(n_layers):
        attention = f"model.layers.{i}.self_attn"
        projections = {
            part: Projection(
                weight=f"{attention}.{part[0]}_proj.weight",
                bias=f"{attention}.{part[0]}_proj.bias" if bias else None,
                module=f"{attention}.k_norm" if key_norm and part == "key" else f"{attention}.{part[0]}_proj",
                start=0,
                stop=width,
            )
            for part in ("key", "value")
        }
        layers.append(
            AttentionSpec(
                layer=i,
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_dim=head_dim,
                rotary_dim=rotary if rotary_layers is None or rotary_layers[i] else 0,
                key_norm=key_norm,
                sliding_window=config.get("sliding_window") if sliding_layers and sliding_layers[i] else None,
                key=projections["key"],
                value=projections["value"],
            )
        )
    return build_model_spec(config, layers)
