"""A whole model of random weights, a plan of random maps for it, and caches as if a long prompt had been read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from kvcompress.bench.workload import RECENT, SINKS, Shape, fill_layer, random_maps
from kvcompress.checkpoint.maps import SiteMaps
from kvcompress.compat import Cache, DynamicLayer, PreTrainedModel, register_unmasked_attention
from kvcompress.model.architectures import read_model_spec
from kvcompress.model.model_spec import Part, Site
from kvcompress.plan import BLOCK_TOKENS, Plan
from kvcompress.runtime.cache import CompressedCache, CompressedLayer
from kvcompress.runtime.static import StaticCache
from kvcompress.site_plan import SitePlan

#: The name of attend_unmasked among transformers' attention implementations.
_UNMASKED = "kvcompress_bench_unmasked"


def llama_config(shape: Shape) -> LlamaConfig:
    """Return the config of a Llama of these sizes; nothing in it limits the context."""
    return LlamaConfig(
        vocab_size=shape.n_vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        bos_token_id=None,
        eos_token_id=None,
    )


def attend_unmasked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one new token, or of a whole prompt, in transformers' interface but without a mask.

    transformers makes one where a step is recorded, and it would keep torch from its fastest kernels.
    """
    causal = query.shape[2] > 1
    output = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=causal, enable_gqa=True)
    return output.transpose(1, 2), None


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a Llama of the shape with random weights, made on the device itself (`meta` takes no memory)."""
    register_unmasked_attention(_UNMASKED, attend_unmasked)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=dtype, attn_implementation=_UNMASKED)
        return model.eval()


def random_plan(
    shape: Shape, keys: dict[int, int], values: dict[int, int], dtype: torch.dtype, *, turn: int = 1
) -> tuple[Plan, dict[Site, SiteMaps]]:
    """Return a plan with the same counts of components, by bits, in every layer, and random maps that fit it."""
    counts: dict[Part, dict[int, int]] = {"key": keys, "value": values}
    of_part = {part: random_maps(shape, part, c, turn=turn) for part, c in counts.items()}
    spec = read_model_spec(llama_config(shape).to_dict())
    sites = [
        SitePlan(
            site.layer,
            site.part,
            basis="frequency" if site.part == "key" and turn == 1 else "latent",
            width=shape.width,
            bits=tuple(sorted(counts[site.part].items(), reverse=True)),
            predicted_loss=0.0,
            block_width=of_part[site.part].blocks.shape[1],
            rotated=site.part == "key" and turn == 1,
            turn=turn if site.part == "key" else 1,
        )
        for site in spec.sites
    ]
    plan = Plan(
        form="coded",
        source="random",
        source_fingerprint="",
        architecture=spec.architecture,
        dtype=str(dtype).removeprefix("torch."),
        sites=tuple(sites),
        sinks=SINKS,
        recent=RECENT,
        options={},
        calibration={},
        loss_in_nats=False,
        maps_bytes=0,
        weight_bytes=0,
    )
    return plan, {site: of_part[site.part] for site in spec.sites}


def fill_compressed(
    cache: CompressedCache, context: int, batch: int, *, device: torch.device, dtype: torch.dtype
) -> CompressedCache:
    """Return an empty cache of `attach`, now as if `context` tokens of each sequence had been read."""
    cache.tokens.append(torch.arange(context, device=device)[None], batch)
    for layer in cache.layers:
        _fill(layer, context, batch, device=device, dtype=dtype)
    return cache


def _fill(layer: CompressedLayer, context: int, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
    encoded = 0 if layer.codecs.exact else layer.tokens.n_encoded(context)
    n_blocks, n_recent = encoded // BLOCK_TOKENS, context - encoded
    fill_layer(layer, n_blocks=n_blocks, n_recent=n_recent, batch=batch, device=device, dtype=dtype)


def fill_fixed(cache: StaticCache, context: int, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
    """Change an empty cache of a fixed capacity to one as if `context` tokens of each sequence had been read."""
    cache.tokens.begin_prefill(torch.arange(context, device=device)[None], batch)
    for layer in cache.layers:
        source = CompressedLayer(layer.codecs, cache.tokens)
        _fill(source, context, batch, device=device, dtype=dtype)
        layer.copy_from(source)


class PreallocatedLayer(DynamicLayer):
    """Exact keys and values in buffers of the final length: a step writes its token in place and copies nothing.

    transformers' DynamicLayer makes a new tensor of all tokens at every step. Attention sees a view of the tokens there
    are and so needs no mask, unlike with a StaticLayer.
    """

    def __init__(self, keys: Tensor, values: Tensor, n_tokens: int) -> None:
        """keys, values: [batch, heads, final length, head_dim], of which the first n_tokens have been read."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self._view(n_tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        self._view(stop)
        return self.keys, self.values

    def _view(self, n_tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :n_tokens] for buffer in self._buffers)


class SteadyLayer(PreallocatedLayer):
    """Exact keys and values that stay one length, all buffers filled: every step writes its token into the last slot.

    So all sizes and addresses stay and a step can be recorded, as attention over one and the same number of tokens.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, -1:] = new
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1  # the last slot's token is yet to come


def uncompressed_cache(
    shape: Shape, context: int, batch: int, *, n_new: int | None, device: torch.device, dtype: torch.dtype
) -> Cache:
    """Return a cache of random exact keys and values of `context` tokens.

    n_new: tokens to come, for which PreallocatedLayers have room; 0 gives SteadyLayers, None the DynamicLayers of
    transformers.
    """
    size = (batch, shape.n_kv_heads, context + (n_new or 0), shape.head_dim)
    layers = []
    for _ in range(shape.n_layers):
        keys, values = (torch.empty(size, device=device, dtype=dtype).normal_() for _ in range(2))
        if n_new is not None:
            layers.append((PreallocatedLayer if n_new else SteadyLayer)(keys, values, context))
            continue
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    return Cache(layers=layers)


def cache_nbytes(cache: Cache) -> int:
    """Return the bytes of a cache's storages, as allocated."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes()
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
