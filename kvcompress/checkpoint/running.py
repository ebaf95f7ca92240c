"""A checkpoint whose family no reader knows -> ModelSpec: its model is built and run, without weights if it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.loading import auto_class, load_weights
from kvcompress.errors import CheckpointError, UnsupportedModelError
from kvcompress.model.config_fields import storage_dtype

if TYPE_CHECKING:
    from kvcompress.model.model_spec import ModelSpec


def spec_by_running(path: Path, config: dict[str, Any], *, weights: bool = True) -> ModelSpec:
    """Return what the model of a directory caches; how it turns with the position is proven where it is calibrated.

    The model runs on the meta device, which takes no memory and little time. Where it cannot (experts are routed by
    numbers that are not there), its weights are loaded. weights: whether they are there.
    Raises UnsupportedModelError or CheckpointError.
    """
    import torch

    from kvcompress.compat import configuration
    from kvcompress.model.probe import NotRun, probe

    dtype = storage_dtype(config)
    try:
        parsed = configuration(path)
        with torch.device("meta"):
            own = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
            model = auto_class(parsed).from_config(parsed, **own).eval()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"model type '{config.get('model_type')}' is not supported: {_first_line(error)}"
        ) from error
    for running in dict.fromkeys((dtype, "bfloat16")):  # there experts run in bfloat16 alone
        try:
            spec = probe(model.to(getattr(torch, running)), prove=False)
        except NotRun:
            continue
        if running == dtype or not any(o.state_bytes for o in spec.own_layers):
            return replace(spec, dtype=dtype)
    if not weights:  # transformers 5.0.0 runs next to nothing there
        raise CheckpointError(
            f"model type '{config.get('model_type')}' is read by running it, which this transformers cannot do without "
            "its weights. Download the checkpoint (hf download) and name its directory."
        )
    return replace(probe(load_weights(path, dtype="auto"), prove=False), dtype=dtype)  # it needs real numbers


def is_quantised(config: dict[str, Any]) -> bool:
    """Return whether a parsed config.json says that its weights are quantised."""
    return bool(config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
