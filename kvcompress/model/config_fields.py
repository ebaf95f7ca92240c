"""Fields of config.json, read with errors that name them."""

from __future__ import annotations

from typing import Any

from kvcompress.errors import CheckpointError, UnsupportedModelError
from kvcompress.model.model_spec import DTYPE_BYTES

#: RoPE kinds whose frequencies depend on the length seen so far: a cached key cannot be un-rotated later.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")

_MOST_LAYERS, _MOST = 10_000, 1 << 24


def positive_int(config: dict[str, Any], field: str, default: int | None = None) -> int:
    """Return a count of config.json, or the default where it has none. Raises CheckpointError for what is no count."""
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {field} must be a positive integer, found {value!r}. Check the file.")
    if value > (_MOST_LAYERS if field == "num_hidden_layers" else _MOST):
        raise CheckpointError(f"config.json: {field} is {value:,}, more than any model has. Check the file.")
    return value


def head_counts(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return (n_heads, n_kv_heads, head_dim), checked for divisibility."""
    hidden = positive_int(config, "hidden_size")
    n_heads = positive_int(config, "num_attention_heads")
    n_kv_heads = positive_int(config, "num_key_value_heads", n_heads)
    if config.get("head_dim") is None and hidden % n_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {n_heads}. Check the file."
        )
    head_dim = positive_int(config, "head_dim", hidden // n_heads)
    if head_dim % 2:
        raise CheckpointError(
            f"config.json: head_dim {head_dim} is odd; RoPE rotates pairs of channels. Check the file."
        )
    if n_heads % n_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}. "
            "Check num_attention_heads and num_key_value_heads."
        )
    return n_heads, n_kv_heads, head_dim


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings from either spelling (`rope_parameters`, or the older `rope_scaling`)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError(
            "config.json: rope_parameters is not one object for all layers; no reader for that."
        )
    return rope


def rotary_dim(config: dict[str, Any], head_dim: int) -> int:
    """Return how many channels of a head RoPE rotates. Raises for length-dependent RoPE."""
    rope = rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    fixed = kind == "longrope" and rope.get("short_factor") and rope["short_factor"] == rope.get("long_factor")
    if kind in _LENGTH_DEPENDENT_ROPE and not fixed:
        raise UnsupportedModelError(
            f"RoPE scaling '{kind}' changes its frequencies with the length of the text, so cached keys cannot be "
            "un-rotated. Supported: default, linear, llama3, yarn."
        )
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    fraction = 1.0 if fraction is None else fraction
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise CheckpointError(f"config.json: partial_rotary_factor must be above 0 and at most 1, found {fraction!r}.")
    return int(head_dim * fraction)


def per_layer(field: str, values: Any, n_layers: int) -> list[Any]:
    """Return a config field that lists one entry a layer, checked for that."""
    if not isinstance(values, list) or len(values) != n_layers:
        raise CheckpointError(f"config.json: {field} must list one entry for each of the {n_layers} layers. Check it.")
    return values


def storage_dtype(config: dict[str, Any]) -> str:
    """Return the dtype that a model computes and caches in, as its configuration or its text decoder's says."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    found = [c.get(name) for c in (config, inner or {}) for name in ("dtype", "torch_dtype")]
    name = str(next((n for n in found if n), "float32")).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"config.json: dtype {name} is not supported. Supported: {', '.join(DTYPE_BYTES)}.")
    return name


def sliding_by_layer_types(config: dict[str, Any]) -> list[bool]:
    """Return which layers use a sliding window, as Qwen-type configs say it (layer_types or max_window_layers)."""
    n_layers = positive_int(config, "num_hidden_layers")
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return [False] * n_layers
    types = config.get("layer_types")
    if types:
        return [t == "sliding_attention" for t in per_layer("layer_types", types, n_layers)]
    return [i >= config.get("max_window_layers", 0) for i in range(n_layers)]
