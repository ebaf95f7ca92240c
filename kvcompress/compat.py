"""Everything of transformers that its releases rename, move or change the meaning of; nothing else here names it.

Known: transformers 5.0 to 5.24 (`OLDEST`, `NEWEST`). What differs between them, and where it is met:

* 5.3: a cache's `get_mask_sizes` is given the number of queries; before, their cache positions. `n_queries`.
* 5.13: `get_max_cache_shape` of a cache layer becomes `get_max_length`. `CacheLayer`.
* 5.24: what forwards, `generate` and outputs called `past_key_values` is called `cache`. The old name is an alias that
  a decorator translates below a model's hooks: one that writes it is not heard. `CACHE_NAMES`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcompress.errors import AttachmentError

__all__ = [
    "Cache",
    "CacheLayer",
    "DynamicCache",
    "DynamicLayer",
    "ForwardArguments",
    "GenerationConfig",
    "PreTrainedModel",
    "sdpa_attention_forward",
]

#: The releases that the tests ran on; pyproject.toml states the same bounds.
OLDEST, NEWEST = "5.0", "5.24"
#: What the cache is called in signatures, keyword arguments and outputs, the newest name first.
CACHE_NAMES = ("cache", "past_key_values")
#: Methods of a model that run transformers' own paged cache.
PAGED_METHODS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
#: Tokens that `generate` stops at where nothing says another number.
_DEFAULT_LENGTH = 20
#: Tokens of a text where nothing limits them.
_NO_LIMIT = 1 << 20
#: Where a configuration keeps the name of its attention; its setter would reach the configurations inside, too.
_IMPLEMENTATION = "_attn_implementation_internal"
#: Attributes of a cache layer that hold states of linear attention.
_STATES = ("conv_states", "recurrent_states")
#: Values of `cache_implementation` that ask for nothing which a compressed cache is not.
_PLAIN_CACHES = (None, "dynamic", "hybrid")


@dataclass(frozen=True, slots=True)
class ForwardArguments:
    """How a model's forward names what the run time reads and changes.

    names: of its positional arguments, in order. cache: that of its cache.
    """

    names: tuple[str, ...]
    cache: str

    @classmethod
    def of(cls, model: nn.Module) -> ForwardArguments:
        """Return the names of a model's class. Raises AttachmentError where its forward takes no cache."""
        kind: Any = type(model)
        return _forward_arguments(kind)

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an argument of a call by its name, or None."""
        place = self.names.index(name) if name in self.names else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def get_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the cache that a call was given, under whatever name, or None."""
        given = self.get(self.cache, args, kwargs)
        return given_cache(kwargs) if given is None else given

    def with_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the same call with another cache."""
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        place = self.names.index(self.cache)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, kwargs | {self.cache: cache}


@lru_cache(maxsize=64)
def _forward_arguments(model: Any) -> ForwardArguments:
    names = tuple(inspect.signature(model.forward).parameters)[1:]
    for cache in CACHE_NAMES:
        if cache in names:
            return ForwardArguments(names, cache)
    raise unproven(f"the forward of {model.__name__} takes no cache by a name that is known")


def given_cache(kwargs: dict[str, Any]) -> Any:
    """Return the cache among keyword arguments, under whatever name, or None."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that gives a cache to the forward or the `generate` of a model."""
    return {ForwardArguments.of(model).cache: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in what a forward or a generation returned, or None."""
    return next((getattr(output, name) for name in CACHE_NAMES if name in output), None)


class Implementations:
    """Which attention the parts of a model used before; own: the text decoder's."""

    def __init__(self, model: PreTrainedModel) -> None:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        self._before = [(c, c._attn_implementation_internal) for c in configs if hasattr(c, _IMPLEMENTATION)]
        self.own: str = text_config(model)._attn_implementation

    def restore(self) -> None:
        for config, own in self._before:
            config._attn_implementation_internal = own


def use_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Implementations:
    """Let a model's text decoder attend with `function`, registered under `name`, given sdpa's masks.

    It changes nothing for models whose attention does not go through the interface, and in a vision tower.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = Implementations(model)
    if uses_interface(model):
        for config in {id(m.config): m.config for m in decoder_of(model).modules() if hasattr(m, "config")}.values():
            if hasattr(config, _IMPLEMENTATION):
                config._attn_implementation_internal = name
    return before


def compile_layers(model: PreTrainedModel) -> None:
    """Have torch compile every layer at its first call, one graph for all that are alike."""
    for layer in decoder_of(model).modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=False)


def register_unmasked_attention(name: str, function: Callable[..., Any]) -> None:
    """Register an attention function for which transformers makes no mask."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, lambda *_, **__: None)


def own_cache(model: Any) -> Cache:
    """Return an empty cache as transformers makes it for a model: a layer of its own kind for each of the model's."""
    return DynamicCache(config=text_config(model))


def layer_tensors(layer: Any, *, states_only: bool = False) -> list[Tensor]:
    """Return what one of transformers' own cache layers holds: keys, values, indexer keys, states of linear layers."""
    tokens = () if states_only else ("keys", "values", "indexer_keys")
    found = [getattr(layer, name, None) for name in (*tokens, *_STATES)]
    flat = [t for held in found for t in (held.values() if isinstance(held, dict) else [held])]
    return [t for t in flat if isinstance(t, Tensor)]


def keeps_only_tokens(layer: Any) -> bool:
    """Return whether a cache layer keeps keys and values, and states that do not grow, and nothing else of a token.

    Those that models define for themselves, or that keep keys of an indexer besides, may hold anything.
    """
    return type(layer).__module__ == transformers.cache_utils.__name__ and not hasattr(layer, "indexer_keys")


def keeps_whole(layer: Any, n_tokens: int) -> bool:
    """Return whether a cache layer keeps the keys and values of all of a text of n_tokens, and nothing else."""
    plain = isinstance(layer, DynamicLayer) and keeps_only_tokens(layer) and not hasattr(layer, "conv_states")
    window = getattr(layer, "sliding_window", None)
    return plain and (window is None or window >= n_tokens)


def state_bytes(layer: Any) -> int:
    """Return the bytes of a cache layer's states, which do not grow with the text."""
    return sum(t.numel() * t.element_size() for t in layer_tensors(layer, states_only=True))


def with_state_of(own: Any, layer: Any) -> Any:
    """Return `layer`, a compressed one, with what `own` keeps beside keys and values (states of a hybrid layer)."""
    if not hasattr(own, "conv_states"):
        return layer
    kinds: tuple[Any, Any] = type(layer), type(own)
    kind = _with_state(*kinds)
    joined = kind.__new__(kind)
    joined.__dict__ |= own.__dict__ | layer.__dict__
    return joined


@lru_cache(maxsize=64)
def _with_state(compressed: Any, own: Any) -> Any:
    """Return a class whose keys and values are those of a compressed layer, and whose states are those of `own`."""

    def lazy_initialization(self: Any, *args: Any, **kwargs: Any) -> None:
        (own if kwargs else compressed).lazy_initialization(self, *args, **kwargs)

    def both(name: str) -> Callable[..., None]:
        def method(self: Any, *args: Any) -> None:
            getattr(transformers.cache_utils.LinearAttentionLayer, name)(self, *args)
            getattr(compressed, name)(self, *args)

        return method

    methods: dict[str, Any] = {name: both(name) for name in ("reset", "reorder_cache", "crop")}
    methods["lazy_initialization"] = lazy_initialization
    return type(f"{compressed.__name__}WithState", (compressed, own), methods)


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text decoder."""
    return model.config.get_text_config(decoder=True)


def configuration(source: Any) -> Any:
    """Return transformers' configuration of a checkpoint: a directory, or a hub id.

    Code that lies beside it is not run. transformers would ask on the terminal, unless it is told so.
    """
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def context_length(model: Any) -> int:
    """Return how many tokens a model was made to read; 2^20 where its configuration states no number (ALiBi)."""
    return int(getattr(text_config(model), "max_position_embeddings", None) or _NO_LIMIT)


def decoder_of(model: Any) -> Any:
    """Return a model's text decoder; `get_decoder` gives any module of that name (ModernBERT's is a projection)."""
    decoder = model.get_decoder()
    return model.base_model if isinstance(decoder, nn.Linear) else decoder


def turns_by_length(model: Any) -> bool:
    """Return whether a model's frequencies may depend on the length of its text."""
    told = getattr(text_config(model), "rope_parameters", None) or {}
    kinds = [told, *(v for v in told.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def own_attention(module: Any, implementation: str) -> Callable[..., Any]:
    """Return the function that an attention module calls under an implementation's name: "eager" is of its own file."""
    if implementation == "eager":
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]  # get_interface is newer than 5.0
    return function


def exact_attention(
    module: Any,
    own: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    reads_cache: bool,
    **kwargs: Any,
) -> Tensor:
    """Return attention as a module computed it before, given sdpa's mask: [batch, n_queries, heads, width of values].

    own: the implementation's name. All but "eager" give what sdpa gives. reads_cache: that it is a decoder's over its
    cache, which is causal whatever the module says of itself.
    """
    if own != "eager":
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return output
    n_queries, n_keys = query.shape[2], key.shape[2]
    is_causal = reads_cache or getattr(module, "is_causal", True)  # what sdpa takes a missing mask for
    if mask is None and n_queries > 1 and is_causal:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    output = own_attention(module, own)(module, query, key, value, mask, **kwargs)[0]
    return output


@contextmanager
def attention_replaced(model: Any, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Within the block, attend(module, own, query, key, value, mask, **others) stands for the attention function.

    own: the name of the implementation that it stands for, whose masks it gets; see own_attention. It changes nothing
    for models whose attention does not go through the interface.
    """
    own: str = text_config(model)._attn_implementation

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        return attend(module, own, query, key, value, attention_mask, **kwargs)

    masks = AttentionMaskInterface()[own]
    implementations = use_attention(model, name, attention)
    AttentionMaskInterface.register(name, masks)
    try:
        yield
    finally:
        implementations.restore()


def uses_interface(model: Any) -> bool:
    """Return whether a model's attention can be exchanged at all; some older files look their classes up by name."""
    files = {type(m).__module__ for m in model.modules() if hasattr(m, "config")}
    return any(hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS") for file in files)


class GivenOutput(BaseModelOutputWithPast):
    """A decoder's output of which only the hidden states are there; fields of any other output are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def n_queries(query_length: int | Tensor) -> int:
    """Return the number of queries from what `get_mask_sizes` is given: it, or (before 5.3) their cache positions."""
    return query_length if isinstance(query_length, int) else query_length.shape[0]


class CacheLayer(CacheLayerMixin):
    """A cache layer under all the names that transformers asks it by; a subclass has `get_max_length`."""

    def get_max_cache_shape(self) -> int:  # before 5.13
        return self.get_max_length()


def quantised_layer(family: str) -> type[CacheLayerMixin]:
    """Return transformers' own quantised cache layer of a family, "hqq" or "quanto"."""
    name = {"hqq": "HQQQuantizedLayer", "quanto": "QuantoQuantizedLayer"}[family]
    layer: type[CacheLayerMixin] = getattr(transformers.cache_utils, name)
    return layer


def other_cache(kwargs: dict[str, Any], config: GenerationConfig) -> str | None:
    """Return the `cache_implementation` of a call of `generate` that a compressed cache cannot be, or None.

    Takes away from the keyword arguments one that asks for what it is, because transformers takes that beside no cache.
    """
    if kwargs.get("cache_implementation") in _PLAIN_CACHES:
        kwargs.pop("cache_implementation", None)
    asked: str | None = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    return None if asked == "hybrid" else asked  # of old checkpoints' generation_config.json: transformers drops it


#: What a call of `generate` may not ask for, if each of its steps is to be one token of each sequence and nothing else.
_NOT_PLAIN = (
    "assistant_model", "assistant_early_exit", "custom_generate", "dola_layers", "guidance_scale", "inputs_embeds",
    "output_attentions", "output_hidden_states", "penalty_alpha", "position_ids", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "return_dict_in_generate", "synced_gpus",
)  # fmt: skip


def asks_for_plain_steps(kwargs: dict[str, Any], config: GenerationConfig) -> bool:
    """Return whether a call of `generate` reads one token of each sequence at a time, of a batch that stays."""
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in (*_NOT_PLAIN, "num_beams", "use_cache")}
    plain = asked.pop("num_beams") in (None, 1) and asked.pop("use_cache") is not False
    return plain and not any(value is not None and value is not False for value in asked.values())


def n_new_tokens(kwargs: dict[str, Any], config: GenerationConfig, n_prompt: int) -> int:
    """Return how many tokens a call of `generate` may add to a prompt."""
    asked: dict[str, int | None] = {
        name: kwargs.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length")
    }
    return asked["max_new_tokens"] or (asked["max_length"] or _DEFAULT_LENGTH) - n_prompt


def hides_tokens(ids: Tensor, kwargs: dict[str, Any], config: GenerationConfig) -> bool:
    """Return whether a call of `generate` pads prompts, by its mask or by what transformers makes one of."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        return not bool((mask == 1).all())
    padding = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    return padding is not None and bool((ids == padding).any())


def inner_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside what torch.compile or PEFT have made of it."""
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            return model


def device_of(module: nn.Module) -> torch.device:
    """Return where a module runs: accelerate may keep its weights elsewhere, and bring them when they are needed."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    for child in module.modules():
        if device is None:
            device = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
    if device is None:
        device = next(chain(module.parameters(), module.buffers())).device  # packed weights are buffers
    return torch.device(device)


def unproven(what: str) -> AttachmentError:
    """Return the error of a model whose attention does not go through the compressed cache; `what`: how it was seen."""
    return AttachmentError(
        f"{what}: nothing would be compressed. This is transformers {transformers.__version__} with torch "
        f"{torch.__version__}; kvcompress was tested with transformers {OLDEST} to {NEWEST}. If yours is another, "
        f"install one of those: pip install 'transformers>={OLDEST},<{_after(NEWEST)}'. If it is one of them, please "
        "report this line as an issue of kvcompress, with the model's name."
    )


def _after(release: str) -> str:
    major, minor = release.split(".")
    return f"{major}.{int(minor) + 1}"
