"""config.json -> ModelSpec, one small reader per model family; anything else is refused with the reason.

To add a family: write a file with a `read(config) -> ModelSpec` (usually one call of
`separate_projections`) and name it in `FAMILIES`. The run time needs nothing more as long as the
family's attention calls `past_key_values.update` and transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvcompress.errors import UnsupportedModelError
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

_LATENT_ATTENTION = "it uses multi-head latent attention (MLA), whose cache already is a low-rank latent"
REFUSED = {
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "minicpm3": _LATENT_ATTENTION,
    "kimi_k2": _LATENT_ATTENTION,
    "mamba": "it has no KV cache",
    "mamba2": "it has no KV cache",
    "gpt2": "it uses learned absolute positions and a Conv1D projection; no reader has been written for it",
}


def read_model_spec(config: dict[str, Any]) -> ModelSpec:
    """Return the ModelSpec of a parsed config.json. Raises UnsupportedModelError with the reason."""
    model_type = config.get("model_type")
    if config.get("kv_lora_rank"):
        raise UnsupportedModelError(f"model type '{model_type}' is not supported: {_LATENT_ATTENTION}.")
    if model_type in REFUSED:
        raise UnsupportedModelError(f"model type '{model_type}' is not supported: {REFUSED[model_type]}.")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type '{model_type}' is not supported: no reader has been written for it. "
            f"Supported families: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type](config)
