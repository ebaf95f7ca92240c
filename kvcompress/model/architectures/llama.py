"""Llama 1 to 3.x, SmolLM 1 and 2, and every checkpoint published in llama's format."""

from typing import Any

from kvcompress.model.model_spec import ModelSpec
from kvcompress.model.projections import separate_projections


def read(config: dict[str, Any]) -> ModelSpec:
    return separate_projections(config, bias=bool(config.get("attention_bias", False)))
