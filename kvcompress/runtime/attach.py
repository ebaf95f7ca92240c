"""Attaching a compressed cache to a loaded transformers model, and giving the model back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import compat
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.compat import PreTrainedModel
from kvcompress.errors import OptionError
from kvcompress.kernels.site import kernels_apply
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import Site
from kvcompress.model.probe import few_logits, probe
from kvcompress.plan import Plan
from kvcompress.runtime.attention import CODED, FOLDED_BY, OWN, compressed_attention
from kvcompress.runtime.cache import CompressedCache
from kvcompress.runtime.entrance import Entrance
from kvcompress.runtime.layers import attention_module, check_fit, layer_kernels, places_of
from kvcompress.runtime.output import read_output
from kvcompress.runtime.recording import recorded_cache
from kvcompress.runtime.simulation import Simulation, simulating
from kvcompress.runtime.static import StaticCache

ATTENTION_NAME = "kvcompress"


class Attachment:
    """A compressed cache attached to a model; `detach` gives the model back as it was."""

    def __init__(self, model: PreTrainedModel, plan: Plan, maps: Mapping[Site, SiteMaps]) -> None:
        spec = read_model_spec(model.config.to_dict()) if plan.form == "folded" else probe(model, prove=False)
        check_fit(spec, plan)
        self.model, self.plan = model, plan
        self.codecs = layer_kernels(model, spec, plan, maps)
        self.places = places_of(model, spec)
        self._n_heads, self._kernels_are_compiled = [attention.n_heads for attention in spec.layers], False
        self._entrance = Entrance(self, compat.decoder_of(model))  # refused, if at all, while nothing is changed
        self._implementations = compat.use_attention(model, ATTENTION_NAME, compressed_attention)
        for name in spec.attending:
            setattr(model.get_submodule(name), OWN, self._implementations.own)
        for attention, codecs in zip(spec.layers, self.codecs, strict=True):
            if plan.form == "folded":
                setattr(attention_module(model, attention), FOLDED_BY, codecs)
            for reader in attention.readers:
                setattr(model.get_submodule(reader), CODED, attention.layer)
        compat.decoder_of(model).forward = self._entrance
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
        self._compile_kernels()
        if capacity is None:
            return CompressedCache(self.codecs, sinks=sinks, recent=recent, places=self.places, window=self.plan.window)
        self.check_capacity(capacity)
        return StaticCache(self.codecs, sinks=sinks, recent=recent, capacity=capacity)

    def _compile_kernels(self) -> None:
        """Before the first cache on a GPU: its first tokens would wait for one layer's kernels after the other."""
        if self._kernels_are_compiled or not kernels_apply(self.model.device):
            return
        from kvcompress.kernels.packing_ahead import compile_packing
        from kvcompress.kernels.turned_ahead import compile_turned

        sites = [site for layer in self.codecs for site in (layer.key_site, layer.value_site) if site is not None]
        here = [site for site in sites if site.packable and kernels_apply(site.codec.encoder.device)]
        compile_packing([(site, None) for site in here])
        compile_turned(list(zip(self.codecs, self._n_heads, strict=True)), self.model.dtype)
        self._kernels_are_compiled = True

    def generation_cache(self, ids: Tensor, **options: Any) -> CompressedCache:
        """Return the empty cache that `generate(ids, **options)` uses if it is given none, to be measured afterwards.

        On a GPU its steps are recorded, where they can be. ids: [batch, n_tokens]; options: those of that call.
        """
        config = options.get("generation_config") or self.model.generation_config or compat.GenerationConfig()
        return self._cache_of(ids, options, config)

    def _cache_of(self, ids: Any, options: dict[str, Any], config: compat.GenerationConfig) -> CompressedCache:
        self._compile_kernels()
        return recorded_cache(self, ids, options, config) or self.new_cache()

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
            kwargs |= compat.cache_argument(self.model, self._cache_of(ids, kwargs, config))
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

    The model must be the one that was compressed, or a relative of it (quantised, fine-tuned); it stays on its devices
    and in its dtype. `detach(model)` undoes it. Raises CheckpointError if the maps are damaged or belong to another
    model, OptionError for a folded output, AttachmentError where the model's attention passes the cache by.
    """
    directory = Path(directory)
    plan, maps = read_output(directory)
    if plan.form == "folded":
        raise OptionError(
            f"{directory} is a folded checkpoint with weights of its own. Use kvcompress.load('{directory}')."
        )
    return attach_plan(model, plan, maps)


def attach_plan(model: PreTrainedModel, plan: Plan, maps: Mapping[Site, SiteMaps]) -> PreTrainedModel:
    """Attach a plan and its maps to a loaded model and return the model."""
    inner = compat.inner_model(model)
    detach(inner)
    # attention of a model's own file may mean something else by what it is given
    is_own = plan.form == "coded" and compat.text_config(inner)._attn_implementation == "eager"
    own = few_logits(inner) if is_own else None
    inner.kvcompress_attachment = Attachment(inner, plan, maps)
    if own is not None:
        _check_same(inner, own)
    return model


def _check_same(model: PreTrainedModel, own: Tensor) -> None:
    """Raise AttachmentError unless a few tokens, all of them exact, have the logits that they had before."""
    within = 1e-2 if next(model.parameters()).dtype == torch.float32 else 1e-1
    error = float((few_logits(model) - own).norm() / own.norm().clamp_min(1e-12))
    if not error <= within:
        detach(model)
        raise compat.unproven(f"{type(model).__name__} has other logits with a cache attached (by {error:.2g} of them)")


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
