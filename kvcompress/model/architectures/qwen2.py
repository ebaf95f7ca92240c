"""Qwen2 and Qwen2.5: biases on query, key and value."""

from typing import Any

from kvcompress.model.config_fields import sliding_by_layer_types
from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.projections import separate_projections


def read(config: dict[str, Any]) -> ModelSpec:
    return separate_projections(config, bias=True, sliding_layers=sliding_by_layer_types(config))
