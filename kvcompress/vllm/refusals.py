"""Which models have no compressed cache in vLLM, and why: `compress --for vllm` looks before anything is measured, the
plugin where the engine makes its layers. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from kvcompress.errors import OptionError
from kvcompress.model.model_spec import OwnLayer

_ALIBI, _CAP, _SINKS, _LATENT = "ALiBi", "a soft cap of attention's scores", "learned sinks", "latent attention (MLA)"
_WINDOW, _SHARED = "a sliding window in the layers that are compressed", "layers that read the cache of others"
#: Fields of config.json that say so where they are set.
_FIELDS = {"kv_lora_rank": _LATENT, "attn_logit_softcapping": _CAP, "num_kv_shared_layers": _SHARED}
#: Models that add ALiBi's numbers to their scores unless config.json says otherwise.
_WITH_ALIBI = frozenset({"bloom", "mpt"})
#: In names of weights; the second is Flint's.
_NAMES_OF_SINKS = ("sink", "softmax_offset")


def refuse(what: str | None, advice: str) -> None:
    """Raise OptionError with what a model has that compressed attention lacks in vLLM, unless that is None."""
    if what is not None:
        raise OptionError(f"with {what} a compressed cache runs in transformers alone, not in vLLM. {advice}")


def of_config(
    config: Mapping[str, Any], own_layers: Iterable[OwnLayer] = (), *, window: int | None = None
) -> str | None:
    """Return what a model has that compressed attention lacks, by its configuration, or None.

    config: of its text part, as in config.json. own_layers: those that are not compressed; window: of those that are.
    """
    found = next((what for field, what in _FIELDS.items() if config.get(field)), None)
    nested = config.get("attn_config")  # MPT's
    fields = {**config, **nested} if isinstance(nested, Mapping) else config
    if found is None and fields.get("alibi", config.get("model_type") in _WITH_ALIBI):
        found = _ALIBI
    if found is None and window is not None:
        found = _WINDOW
    for own in own_layers:  # windows run beside compressed layers
        if found is None and (own.window is None or own.state_bytes):
            found = f"layers that keep something else beside compressed ones (layer {own.layer}: {own.kind})"
    return found


def of_tensors(names: Iterable[str], layers: Collection[int]) -> str | None:
    """Return what the names of a checkpoint's weights tell beyond its configuration, or None.

    layers: those that are compressed; in others, which keep a window, the engine has learned sinks itself.
    """
    for name in names:
        parts = name.split(".")
        if any(sign in part for part in parts[-2:] for sign in _NAMES_OF_SINKS):
            layer = next((int(part) for part in parts if part.isdigit()), None)
            if layer is None or layer in layers:
                return _SINKS
    return None


def of_latent_layer() -> str:
    """Return what a layer has that the engine makes as one of latent attention."""
    return _LATENT


def of_layer(
    *, alibi_slopes: Any, sliding_window: Any, logits_soft_cap: Any, attn_type: str, shares: Any, sinks: Any
) -> str | None:
    """Return what the engine asks of a compressed layer that compressed attention lacks, or None.

    In vLLM's own words, but for shares: the layer whose cache it is to read.
    """
    asked = {
        _ALIBI: alibi_slopes is not None,
        _WINDOW: sliding_window is not None,
        _CAP: bool(logits_soft_cap),
        f"attention of type {attn_type}": attn_type != "decoder",
        _SHARED: shares is not None,
        _SINKS: sinks is not None,
    }
    return next((what for what, found in asked.items() if found), None)
