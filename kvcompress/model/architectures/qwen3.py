"""Qwen3: RMS norm on each key and query head before RoPE, so keys are tapped after the norm."""

from typing import Any

from kvcompress.model.config_fields import sliding_by_layer_types
from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.projections import separate_projections


def read(config: dict[str, Any]) -> ModelSpec:
    return separate_projections(
        config,
        bias=bool(config.get("attention_bias", False)),
        key_norm=True,
        sliding_layers=sliding_by_layer_types(config),
    )
