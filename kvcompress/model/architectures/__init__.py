"""config.json -> ModelSpec, one small reader per model family: only what running a model cannot show.

Which weights make keys and values, for folding and for maps without calibration, and sizes without a model (inspect).
Other models are read by running them (kvcompress.model.probe). To add a family: write a file with a
`read(config) -> ModelSpec` (usually one call of `separate_projections`) and name it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcompress.errors import CheckpointError, UnsupportedModelError
from kvcompress.model.architectures import llama, mistral, phi3, qwen2, qwen3, smollm3
from kvcompress.model.model_spec import ModelSpec

FAMILIES: dict[str, Callable[[dict[str, Any]], ModelSpec]] = {
    "llama": llama.read,
    "mistral": mistral.read,
    "phi3": phi3.read,
    "qwen2": qwen2.read,
    "qwen3": qwen3.read,
    "smollm3": smollm3.read,
}


def is_read(config: dict[str, Any]) -> bool:
    """Return whether a reader knows where the weights make keys and values, which quantised ones never say."""
    return str(config.get("model_type")) in FAMILIES and not config.get("quantization_config")


def read_model_spec(config: dict[str, Any]) -> ModelSpec:
    """Return the ModelSpec of a parsed config.json. Raises UnsupportedModelError with the reason."""
    model_type = config.get("model_type")
    if not is_read(config):
        raise UnsupportedModelError(
            f"which weights make keys and values is not known of model type '{model_type}', or they are quantised: "
            f"this needs one of {', '.join(FAMILIES)} in 16 or 32 bits. The coded form (compress) does without."
        )
    try:
        return FAMILIES[config["model_type"]](config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json: a field is not what {config['model_type']} has ({error!r}). Check the file."
        ) from error
