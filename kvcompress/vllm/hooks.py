"""What is put into vLLM's own classes so that a compressed checkpoint gets compressed layers. Ordinary models pass
through."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.maps import MAPS_FILE
from kvcompress.errors import OptionError
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm import refusals
from kvcompress.vllm.backend import ExactBackend, PackedBackend, compressed_layers
from kvcompress.vllm.codecs import layer_plans
from kvcompress.vllm.layers import CompressedModel, make_layer
from kvcompress.vllm.managers import register_managers
from kvcompress.vllm.names import (
    Attention,
    DefaultModelLoader,
    FullAttentionSpec,
    MLAAttention,
    VllmConfig,
    backend_beside_ours,
    extract_layer_index,
    first_runner,
    get_current_vllm_config,
)
from kvcompress.vllm.source import UNCOMPRESSED, Source, find_directory, read_source
from kvcompress.vllm.specs import ExactSpec, PackedSpec
from kvcompress.vllm.summary import say

#: Begins the names of a draft model's layers.
DRAFT_PREFIX = "draft_model."


def install() -> None:
    """Wrap vLLM's attention layer and weight loader; a second call changes nothing."""
    register_managers()
    if getattr(Attention.__init__, "kvcompress", False):
        return
    Attention.__init__ = _marked(Attention.__init__, _init)
    Attention.get_kv_cache_spec = _marked(Attention.get_kv_cache_spec, _kv_cache_spec)
    MLAAttention.__init__ = _marked(MLAAttention.__init__, _refuse_latent)
    DefaultModelLoader._prepare_weights = _marked(DefaultModelLoader._prepare_weights, _prepare_weights)


def _marked(original: Any, wrapper: Any) -> Any:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.kvcompress = True  # type: ignore[attr-defined]
    return wrapped


def source_of(config: VllmConfig) -> Source | None:
    """Return the maps of the model that a config loads, None for an ordinary one."""
    model = config.model_config
    if model is None:
        return None
    is_draft = drafts(config)
    directory = find_directory(
        str(model.model), revision=model.revision, additional=config.additional_config, is_draft=is_draft
    )
    if directory is not None and is_draft:
        raise OptionError(
            f"the draft model {model.model} has a compressed cache, which only the model that it drafts for can have. "
            "Name the model that it was compressed from."
        )
    return None if directory is None else read_source(directory)


def drafts(config: VllmConfig) -> bool:
    """Return whether a config is that of a model that only drafts tokens for another one.

    Where nothing but the text drafts tokens (n-grams), vLLM names the model itself as the one that drafts.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.draft_model_config is speculative.target_model_config:
        return False
    return bool(speculative.draft_model_config is config.model_config)


def _init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Attention.__init__: a layer that the plan knows gets our backend, and exact pages beside its packed ones."""
    config = get_current_vllm_config()
    with torch.device("cpu"):
        source = source_of(config)
    name = kwargs.get("prefix", "")
    layer = None if source is None else extract_layer_index(name)
    first = next(compressed_layers(config), None)
    if source is None or layer is None or layer_plans(source.plan, layer) is None:
        if source is not None or first is not None:  # a sliding window, or a draft model, whose pages lie beside ours
            kwargs["attn_backend"] = kwargs.get("attn_backend") or backend_beside_ours()
        original(self, *args, **kwargs)
        return
    _check(config)
    kwargs["attn_backend"] = PackedBackend
    original(self, *args, **kwargs)
    device = torch.empty(0).device  # vLLM makes its layers where they will run, in the model's dtype
    with torch.device("cpu"), _float32():
        model = CompressedModel.of(source, config) if first is None else first.kvcompress.model
        compressed = make_layer(
            model, layer, self, backend=ExactBackend, dtype=config.model_config.dtype, device=device
        )
    self.kvcompress = compressed
    config.compilation_config.static_forward_context[compressed.exact.name] = compressed.exact
    if first is None:
        runner = first_runner()
        if not getattr(runner.get_kv_cache_spec, "kvcompress", False):
            runner.get_kv_cache_spec = _marked(runner.get_kv_cache_spec, _draft_first)
        compressed.exact.when_bound = functools.partial(say, config, compressed)


def _refuse_latent(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """MLAAttention.__init__: its cache is another one, and would stay as it is without a word."""
    with torch.device("cpu"):
        source = source_of(get_current_vllm_config())
    if source is not None:
        refusals.refuse(refusals.of_latent_layer(), UNCOMPRESSED)
    original(self, *args, **kwargs)


@contextmanager
def _float32() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


def _check(config: VllmConfig) -> None:
    """Raise OptionError for what the engine was asked and a compressed cache cannot do."""
    cache, parallel = config.cache_config, config.parallel_config
    refused = {
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", "bfloat16", "float16"),
        "a KV connector (--kv-transfer-config)": config.kv_transfer_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--disable-hybrid-kv-cache-manager": bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
    }
    for what, asked in refused.items():
        if asked:
            raise OptionError(f"a compressed cache does not go with {what}. Leave it out.")


def _kv_cache_spec(original: Any, self: Any, vllm_config: VllmConfig) -> Any:
    compressed = getattr(self, "kvcompress", None)
    if compressed is not None:
        return compressed.packed_spec(vllm_config)
    spec = original(self, vllm_config)
    if isinstance(spec, FullAttentionSpec) and getattr(self.attn_backend, "beside_ours", False):
        # A runner on CPUs zeroes new pages by numbers that are wrong where attention cuts pages into smaller ones.
        return replace(spec, block_size=BLOCK_TOKENS)
    return spec


def _draft_first(original: Any, self: Any) -> Any:
    """GPUModelRunner.get_kv_cache_spec, of the runner on CPUs as well: a draft model's layers come first.

    vLLM's first runner takes the first group of pages for the draft model's, without looking.
    """
    specs = original(self)
    speculative = self.vllm_config.speculative_config
    if speculative is None or not speculative.uses_draft_model():
        return specs
    ours = {name for name, spec in specs.items() if isinstance(spec, (PackedSpec, ExactSpec))}
    return dict(sorted(specs.items(), key=lambda item: bool(ours) and not item[0].startswith(DRAFT_PREFIX)))


def _prepare_weights(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The maps lie beside the weights, and vLLM would load every .safetensors file as weights."""
    folder, files, *rest = original(self, *args, **kwargs)
    return folder, [file for file in files if Path(file).name != MAPS_FILE], *rest
