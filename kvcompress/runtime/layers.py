"""What each layer of a loaded model gets of a plan and its maps, and whether those are the model's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kvcompress import compat
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.codec.codec import layer_codecs
from kvcompress.compat import PreTrainedModel
from kvcompress.errors import CheckpointError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.model_spec import PARTS, AttentionSpec, ModelSpec, Site
from kvcompress.model.probe import likeness, proven, turned_otherwise
from kvcompress.model.rope import Rotary
from kvcompress.model.rotation import Rotation
from kvcompress.plan import Plan
from kvcompress.runtime.places import Places

#: Models whose caches agree less are not of one family; see model.probe.likeness.
_ALIKE = 0.8


def layer_kernels(
    model: PreTrainedModel, spec: ModelSpec, plan: Plan, maps: Mapping[Site, SiteMaps]
) -> list[LayerKernels]:
    """Return each layer's codecs on its own device. Raises CheckpointError where the model is not the maps' own."""
    rotaries = _rotaries(model, spec, plan)
    layers = []
    for attention in spec.layers:
        named = attention.readers or ((attention.key.module,) if attention.key is not None else ())
        device = compat.device_of(model.get_submodule(named[0]) if named else model)
        layers.append(kernels_of(attention, plan, maps, rotaries, device))
    return layers


def kernels_of(
    attention: AttentionSpec,
    plan: Plan,
    maps: Mapping[Site, SiteMaps],
    rotaries: Mapping[Site, Rotary],
    device: torch.device,
) -> LayerKernels:
    """Return one layer's codecs on a device. rotaries: how sites turn."""
    plans = {s.site: s for s in plan.sites if s.layer == attention.layer}
    sites = {part: Site(attention.layer, part) for part in PARTS}
    coded = {part: None if plans[site].exact else maps[site] for part, site in sites.items()}
    planned = plans[sites["key"]]
    key, value = layer_codecs(coded["key"], coded["value"], device, turn=planned.turn)
    rotary = rotaries.get(sites["key"]) if key is not None else None
    rotated_mean, values = None, attention.of("value")
    if key is not None and planned.rotated and rotary is not None:
        rotated_mean, key.mean = key.mean, None  # it turns with the position, which a codec does not know
    return LayerKernels(
        key,
        value,
        rotary,
        attention.n_kv_heads,
        attention.head_dim,
        cached_rotated=planned.rotated,
        rotated_mean=rotated_mean,
        turn=planned.turn,
        value_heads=values.n_kv_heads,
        value_dim=values.head_dim,
        value_rotary=rotaries.get(sites["value"]) if value is not None else None,
    )


def planned_rotations(plan: Plan) -> dict[Site, Rotation]:
    """Return how sites turn, as the plan says."""
    return {s.site: rotation for s in plan.sites if (rotation := plan.rotation_of(s)) is not None}


def rotaries_of(planned: Mapping[Site, Rotation], device: torch.device) -> dict[Site, Rotary]:
    """Return what turns each site; sites of one rotation share a Rotary."""
    by = {rotation: Rotary.by(rotation, device) for rotation in set(planned.values())}
    return {site: by[rotation] for site, rotation in planned.items()}


def _rotaries(model: PreTrainedModel, spec: ModelSpec, plan: Plan) -> dict[Site, Rotary]:
    """Return how sites turn: as the plan says, and the model is seen to do; of an earlier output, as the model does.

    Raises CheckpointError where the model turns its keys in another way. Sites of one rotation share a Rotary.
    """
    if plan.form == "folded":  # its maps are applied to heads that RoPE has turned
        return {}
    planned = planned_rotations(plan)
    if not plan.rotations:
        planned = proven(model, spec).rotations
    elif (wrong := turned_otherwise(model, spec.turned(planned))) is not None:
        raise CheckpointError(
            f"the model turns {wrong} with the position in another way than the model that the maps were made for "
            "(other RoPE settings in config.json?). Attach them to their own model."
        )
    alike = likeness(model, spec, plan.signature) if plan.signature else 1.0
    if not alike > _ALIKE:
        raise CheckpointError(
            "the model is no relative of the one that the maps were made for, though of its sizes: what it caches of "
            f"the same tokens agrees to {alike:.2f} (1: the same; quantised and fine-tuned: above {_ALIKE}). "
            "Attach them to their own model."
        )
    return rotaries_of(planned, compat.device_of(compat.decoder_of(model)))


def places_of(model: PreTrainedModel, spec: ModelSpec) -> Places:
    """Return where compressed layers stand in the model's cache, and what its other layers keep."""
    places = tuple(a.layer for a in spec.layers)
    readers = tuple(len(a.readers) for a in spec.layers)
    is_whole = not spec.own_layers and places == tuple(range(len(places)))
    hybrid = any(hasattr(layer, "conv_states") for layer in compat.own_cache(model).layers)
    own = None if is_whole and not hybrid else lambda: list(compat.own_cache(model).layers)
    return Places(places, readers, own)


def attention_module(model: PreTrainedModel, attention: AttentionSpec) -> nn.Module:
    """Return the module whose projections make a layer's keys and values."""
    return model.get_submodule(attention.projection("value").module.rpartition(".")[0])


def check_fit(spec: ModelSpec, plan: Plan) -> None:
    """Raise CheckpointError unless a plan was made for such a model."""
    widths = {site: spec.width(site) for site in spec.sites}
    planned = {s.site: s.width for s in plan.sites}
    if spec.architecture != plan.architecture or widths != planned:
        raise CheckpointError(
            f"the maps were made for a {plan.architecture} model with {plan.n_layers} layers; this is a "
            f"{spec.architecture} model with {len(spec.layers)} layers, or its heads differ. "
            "Attach them to their own model."
        )
    for site in plan.sites:
        rotation, head_dim = plan.rotation_of(site), spec.attention(site.site).head_dim
        if rotation is not None and rotation.start + rotation.width > head_dim:
            raise CheckpointError(
                f"the plan turns channels up to {rotation.start + rotation.width} of {site.site}, whose heads have "
                f"{head_dim}. Attach the maps to their own model."
            )
