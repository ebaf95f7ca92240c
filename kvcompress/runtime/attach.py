"""Attaching a compressed cache to a transformers model, and loading compressed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompress import compat
from kvcompress.checkpoint.belonging import check_files
from kvcompress.checkpoint.headers import check_sizes
from kvcompress.checkpoint.loading import explained_loading, load_weights
from kvcompress.checkpoint.maps import SiteMaps, load_maps
from kvcompress.codec.codec import layer_codecs
from kvcompress.compat import PreTrainedModel
from kvcompress.errors import CheckpointError, OptionError
from kvcompress.kernels.layer import LayerKernels
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import PARTS, AttentionSpec, ModelSpec, Site
from kvcompress.model.probe import likeness, probe, proven, turned_otherwise
from kvcompress.model.rope import Rotary
from kvcompress.plan import Plan
from kvcompress.runtime.attention import CODED, FOLDED_BY, OWN, compressed_attention
from kvcompress.runtime.cache import CompressedCache
from kvcompress.runtime.entrance import Entrance
from kvcompress.runtime.head_norm import HEAD_NORM, add_head_norm
from kvcompress.runtime.places import Places
from kvcompress.runtime.recording import recorded_cache
from kvcompress.runtime.simulation import Simulation, simulating
from kvcompress.runtime.static import StaticCache

ATTENTION_NAME = "kvcompress"
#: Models whose caches agree less are not of one family; see model.probe.likeness.
_ALIKE = 0.8


class Attachment:
    """A compressed cache attached to a model; `detach` gives the model back as it was."""

    def __init__(self, model: PreTrainedModel, plan: Plan, maps: dict[Site, SiteMaps]) -> None:
        spec = read_model_spec(model.config.to_dict()) if plan.form == "folded" else probe(model, prove=False)
        check_fit(spec, plan)
        self.model, self.plan = model, plan
        self.codecs = _layer_codecs(model, spec, plan, maps)
        self.places = _places(model, spec)
        self._implementations = compat.use_attention(model, ATTENTION_NAME, compressed_attention)
        for name in spec.attending:
            setattr(model.get_submodule(name), OWN, self._implementations.own)
        for attention, codecs in zip(spec.layers, self.codecs, strict=True):
            if plan.form == "folded":
                setattr(_attention_module(model, attention), FOLDED_BY, codecs)
            for reader in attention.readers:
                setattr(model.get_submodule(reader), CODED, attention.layer)
        self._entrance = Entrance(self, model.get_decoder())
        model.get_decoder().forward = self._entrance
        if plan.form == "coded":  # a folded model keeps its virtual heads in an ordinary DynamicCache
            self._generate = model.generate
            model.generate = self._generate_compressed
            for name in compat.PAGED_METHODS:
                if hasattr(model, name):
                    setattr(model, name, _Refused(name))

    def new_cache(
        self, capacity: int | None = None, *, sinks: int | None = None, recent: int | None = None
    ) -> CompressedCache:
        """Return an empty compressed cache for this model, to be passed as past_key_values.

        sinks, recent: tokens that stay exact, the plan's by default.
        capacity: tokens of a sequence for which everything is allocated at once, at the first prompt; then addresses
        never change. Such a cache takes a prompt without padding, then a token at a time. Raises OptionError where the
        model cannot have one.
        """
        sinks = self.plan.sinks if sinks is None else sinks
        recent = self.plan.recent if recent is None else recent
        if capacity is None:
            return CompressedCache(self.codecs, sinks=sinks, recent=recent, places=self.places)
        self.check_capacity(capacity)
        return StaticCache(self.codecs, sinks=sinks, recent=recent, capacity=capacity)

    @contextmanager
    def simulated(self, *, sinks: int, recent: int, block: int = 1) -> Iterator[None]:
        """Within the block, forwards without a cache are decode-faithful: old tokens are seen compressed.

        In this thread alone: others go on as before, and a thread that is started here must enter a block of its own.
        block: tokens that are encoded together; generation encodes plan.BLOCK_TOKENS, 1 is the strictest.
        """
        if self.plan.form == "folded":
            yield
            return
        with simulating(self, Simulation(sinks, recent, block)):
            yield

    def detach(self) -> None:
        self._entrance.close()
        for module in self.model.modules():
            for name in (CODED, FOLDED_BY, OWN):
                module.__dict__.pop(name, None)
        for name in ("generate", *compat.PAGED_METHODS):
            self.model.__dict__.pop(name, None)
        self._implementations.restore()

    def check_capacity(self, capacity: int) -> None:
        """Raise OptionError where the model cannot have a cache at fixed addresses for `capacity` tokens."""
        if capacity < 1:
            raise OptionError(f"capacity is {capacity}, it must be at least 1 token.")
        if self.plan.form == "folded":
            raise OptionError("a folded checkpoint keeps its cache in a DynamicCache: it has no fixed capacity.")
        if self.places.own is not None or not self.places.are_all_read or self.places.n_attending != len(self.codecs):
            raise OptionError(
                "a cache of a fixed capacity needs a model whose every layer is compressed and read by its own "
                "attention. Use new_cache() without a capacity."
            )
        if any(c.value_shape != (c.n_kv_heads, c.head_dim) for c in self.codecs):
            raise OptionError("a cache of a fixed capacity needs values as wide as keys. Use new_cache() without one.")
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None and capacity >= window:
            raise OptionError(
                f"capacity is {capacity}, and the model's sliding window of {window} tokens would hide some of them: a "
                "cache of a fixed capacity must be shorter. Use new_cache() without a capacity."
            )

    def _generate_compressed(self, *args: Any, **kwargs: Any) -> Any:
        config = (
            (args[1] if len(args) > 1 else kwargs.get("generation_config"))
            or self.model.generation_config
            or compat.GenerationConfig()
        )
        use_cache = kwargs.get("use_cache", config.use_cache)
        other = compat.other_cache(kwargs, config)
        if use_cache is not False and other is not None:
            raise _refused(f'cache_implementation="{other}" asks for a cache of transformers\' own')
        if use_cache is not False and compat.given_cache(kwargs) is None:
            ids = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
            cache = recorded_cache(self, ids, kwargs, config) or self.new_cache()
            kwargs |= compat.cache_argument(self.model, cache)
        return self._generate(*args, **kwargs)


class _Refused:
    """Stands in for a method of an attached model that would pass the compressed cache by."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise _refused(f"{self._name} runs transformers' own paged cache")


def _refused(what: str) -> OptionError:
    return OptionError(
        f"{what}, which compresses nothing, and a compressed cache is attached to the model. Call model.generate "
        "without it: batches of prompts are padded on the left, and on a GPU steps are recorded by themselves. For "
        "fixed addresses see kvcompress.runtime.graph.GraphDecoder; for the model as it was, kvcompress.detach(model)."
    )


def attach(model: PreTrainedModel, directory: str | Path) -> PreTrainedModel:
    """Attach the maps in `directory` to a loaded model and return it; its `generate` then compresses its cache.

    The model must be the one that was compressed (same architecture and sizes). `detach(model)` undoes it.
    Raises CheckpointError if the maps are damaged or belong to another model.
    """
    directory = Path(directory)
    plan, maps = read_output(directory)
    if plan.form == "folded":
        raise OptionError(
            f"{directory} is a folded checkpoint with weights of its own. Use kvcompress.load({directory})."
        )
    return attach_plan(model, plan, maps)


def attach_plan(model: PreTrainedModel, plan: Plan, maps: dict[Site, SiteMaps]) -> PreTrainedModel:
    """Attach a plan and its maps to a loaded model and return the model."""
    inner = compat.inner_model(model)
    detach(inner)
    inner.kvcompress_attachment = Attachment(inner, plan, maps)
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """Return the model's Attachment. Raises OptionError if nothing is attached."""
    attachment = compat.inner_model(model).__dict__.get("kvcompress_attachment")
    if attachment is None:
        raise OptionError("the model has no compressed cache attached. Use kvcompress.load or kvcompress.attach.")
    return attachment


def detach(model: nn.Module) -> None:
    """Give an attached model back as it was; does nothing for any other."""
    attachment = compat.inner_model(model).__dict__.pop("kvcompress_attachment", None)
    if attachment is not None:
        attachment.detach()


def read_output(directory: Path) -> tuple[Plan, dict[Site, SiteMaps]]:
    """Return the plan and the maps of an output. Raises CheckpointError if they are damaged or do not fit together."""
    plan = Plan.load(directory)
    maps = load_maps(directory, most=plan.most_maps_bytes)
    for site in plan.sites:
        found = maps.pop(site.site, None) if site.exact else maps.get(site.site)
        size = (0, 0, 0) if found is None else (len(found.block), found.blocks.numel(), found.blocks.shape[1])
        planned = (0, 0, 0) if site.exact else (site.rank, site.width, site.block_width)
        if size != planned or (found is not None and tuple(found.bits.tolist()) != site.component_bits):
            raise CheckpointError(
                f"{directory}: the maps of {site.site} keep {size[0]} of {size[1]} numbers in blocks of {size[2]}, the "
                f"plan says {planned[0]} of {planned[1]} in blocks of {planned[2]}, or their bits differ. "
                "The files are of different outputs: compress again."
            )
    strangers = set(maps) - {site.site for site in plan.sites}
    if strangers:
        raise CheckpointError(
            f"{directory} holds maps of {min(strangers)}, which its plan does not name. Compress again."
        )
    check_files(directory, plan.files)
    return plan, maps


def load(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Return a transformers model whose `generate` uses the compressed cache of `directory` by itself.

    base: the original checkpoint, for an output that holds only maps; the recorded source by default.
    Raises CheckpointError if files are missing, damaged, or belong to another model.
    """
    directory = Path(directory)
    plan, maps = read_output(directory)
    if plan.form == "folded":
        model = _load_folded(directory, plan, maps, dtype)
    else:
        weights = str(directory if (directory / "config.json").is_file() else base or plan.source)
        if Path(weights).is_absolute() and not Path(weights).is_dir():
            raise CheckpointError(
                f"{directory} holds only maps, and their source {weights} is not here. Name the original with --base."
            )
        model = load_weights(weights, dtype=dtype)
    return attach_plan(model.to(device).eval(), plan, maps)


def _load_folded(directory: Path, plan: Plan, maps: dict[Site, SiteMaps], dtype: torch.dtype | str) -> PreTrainedModel:
    """Return the model with its smaller k_proj and v_proj in place."""
    from safetensors.torch import load_file

    check_sizes(directory)
    with explained_loading(directory):
        config = AutoConfig.from_pretrained(directory)
    name = plan.dtype if dtype == "auto" else dtype
    wanted = getattr(torch, name) if isinstance(name, str) else name
    with explained_loading(directory):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    spec = read_model_spec(config.to_dict())
    check_fit(spec, plan)
    for site in maps:
        projection = spec.layers[site.layer].projection(site.part)
        parent, _, name = projection.module.rpartition(".")
        full: Any = model.get_submodule(projection.module)
        rank = maps[site].encoder.shape[0]
        folded = _empty_linear(full.in_features, rank, bias=full.bias is not None, dtype=wanted)
        setattr(model.get_submodule(parent), name, folded)
    state: dict[str, Any] = {}
    try:
        for file in sorted(directory.glob("model*.safetensors")):
            state.update(load_file(file))
        _add_head_norms(model, spec, state)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: the folded weights are damaged ({str(error).splitlines()[0]}).") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        name = next(iter([*unexpected, *(set(missing) - tied)]))
        raise CheckpointError(f"{directory}: tensor {name} does not fit the folded model. Compress again.")
    model.tie_weights()
    if (directory / "generation_config.json").is_file():
        with explained_loading(directory):
            model.generation_config = compat.GenerationConfig.from_pretrained(directory)
    return model


def _add_head_norms(model: PreTrainedModel, spec: ModelSpec, state: dict[str, Any]) -> None:
    """Add the norms of head outputs that a healed checkpoint has weights of."""
    for attention in spec.layers:
        path = attention.projection("value").module.rpartition(".")[0]
        if f"{path}.{HEAD_NORM}.weight" in state:
            add_head_norm(model.get_submodule(path), n_heads=attention.n_heads, head_dim=attention.head_dim)


def _empty_linear(n_in: int, n_out: int, *, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """Return a Linear whose weights are still to come; nn.Linear's own initialisation warns where n_out is 0."""
    linear = nn.Linear(1, 1, bias=bias)
    linear.in_features, linear.out_features = n_in, n_out
    linear.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.empty(n_out, dtype=dtype))
    return linear


def _layer_codecs(
    model: PreTrainedModel, spec: ModelSpec, plan: Plan, maps: dict[Site, SiteMaps]
) -> list[LayerKernels]:
    plans = {s.site: s for s in plan.sites}
    rotaries = _rotaries(model, spec, plan)
    layers = []
    for attention in spec.layers:
        named = attention.readers or ((attention.key.module,) if attention.key is not None else ())
        device = compat.device_of(model.get_submodule(named[0]) if named else model)
        sites = {part: Site(attention.layer, part) for part in PARTS}
        coded = {part: None if plans[site].exact else maps[site] for part, site in sites.items()}
        planned = plans[sites["key"]]
        key, value = layer_codecs(coded["key"], coded["value"], device, turn=planned.turn)
        rotary = rotaries.get(sites["key"]) if key is not None else None
        rotated_mean, values = None, attention.of("value")
        if key is not None and planned.rotated and rotary is not None:
            rotated_mean, key.mean = key.mean, None  # it turns with the position, which a codec does not know
        layers.append(
            LayerKernels(
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
        )
    return layers


def _rotaries(model: PreTrainedModel, spec: ModelSpec, plan: Plan) -> dict[Site, Rotary]:
    """Return how sites turn: as the plan says, and the model is seen to do; of an earlier output, as the model does.

    Raises CheckpointError where the model turns its keys in another way. Sites of one rotation share a Rotary.
    """
    if plan.form == "folded":  # its maps are applied to heads that RoPE has turned
        return {}
    planned = {s.site: rotation for s in plan.sites if (rotation := plan.rotation_of(s)) is not None}
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
    by = {rotation: Rotary.by(rotation, compat.device_of(model.get_decoder())) for rotation in set(planned.values())}
    return {site: by[rotation] for site, rotation in planned.items()}


def _places(model: PreTrainedModel, spec: ModelSpec) -> Places:
    places = tuple(a.layer for a in spec.layers)
    readers = tuple(len(a.readers) for a in spec.layers)
    is_whole = not spec.own_layers and places == tuple(range(len(places)))
    hybrid = any(hasattr(layer, "conv_states") for layer in compat.own_cache(model).layers)
    own = None if is_whole and not hybrid else lambda: list(compat.own_cache(model).layers)
    return Places(places, readers, own)


def _attention_module(model: PreTrainedModel, attention: AttentionSpec) -> nn.Module:
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
