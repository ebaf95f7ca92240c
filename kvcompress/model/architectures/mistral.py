"""Mistral: llama's tensors, with a sliding window in every layer where the config gives one."""

from typing import Any

from kvcompress.model.config_fields import positive_int
from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.projections import separate_projections


def read(config: dict[str, Any]) -> ModelSpec:
    sliding = config.get("sliding_window") is not None
    return separate_projections(config, sliding_layers=[sliding] * positive_int(config, "num_hidden_layers"))
