"""SmolLM3: every fourth layer has no RoPE (no_rope_layers holds 1 where RoPE is used)."""

from typing import Any

from kvcompress.model.config_fields import per_layer, positive_int, sliding_by_layer_types
from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.projections import separate_projections


def read(config: dict[str, Any]) -> ModelSpec:
    n_layers = positive_int(config, "num_hidden_layers")
    interval = config.get("no_rope_layer_interval", 4)
    uses_rope = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(n_layers)]
    return separate_projections(
        config,
        bias=bool(config.get("attention_bias", False)),
        rotary_layers=[bool(x) for x in per_layer("no_rope_layers", uses_rope, n_layers)],
        sliding_layers=sliding_by_layer_types(config),
    )
