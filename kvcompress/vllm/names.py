"""Everything of vLLM that kvcompress touches, and which versions have it under these names. Nothing else imports
vLLM."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm._custom_ops import reshape_and_cache_flash
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "BlockPool",
    "CommonAttentionMetadata",
    "DefaultModelLoader",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheBlock",
    "KVCacheLayout",
    "KVCacheSpecRegistry",
    "MLAAttention",
    "MultipleOf",
    "Request",
    "SingleTypeKVCacheManager",
    "SlidingWindowSpec",
    "VllmConfig",
    "backend_beside_ours",
    "exact_attention",
    "extract_layer_index",
    "first_runner",
    "get_current_vllm_config",
    "get_forward_context",
    "init_logger",
    "register_spec",
    "reshape_and_cache_flash",
    "resolve_block_hashes",
    "sum_over_ranks",
    "tensor_parallel_place",
]


def tensor_parallel_place() -> tuple[int, int]:
    """Return this process's rank in its tensor parallel group, and how many ranks there are."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of x over the ranks of the tensor parallel group, all of which call this in the same order.

    It may be x itself. Between CUDA graphs, not inside of them.
    """
    return tensor_model_parallel_all_reduce(x)


def first_runner() -> Any:
    """Return the model runner of CPUs, and of GPUs for what vLLM's second one lacks; importing it takes a while."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return GPUModelRunner


def backend_beside_ours() -> type[AttentionBackend] | None:
    """Return the backend of a layer that is not compressed, None where vLLM's own choice takes pages of all layers side
    by side, as ours lie."""
    if not current_platform.is_cpu():
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    class Zeroing(CPUAttentionBackendImpl):
        """Reads whole pages, what is behind a sequence's end with weights of 0; so that must be numbers. A GPU's runner
        zeroes pages that belonged to other layers, a CPU's does not."""

        def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
            page_tokens = kv_cache.shape[2]
            kv_cache[slots[slots % page_tokens == 0] // page_tokens] = 0  # a page is filled from its beginning
            super().do_kv_cache_update(layer, key, value, kv_cache, slots)

    class SideBySide(CPUAttentionBackend):
        """That of CPUs says that it reads pages layer by layer; but it goes by their strides."""

        beside_ours = True

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
            return (KVCacheLayout.BLHNC,)

        @staticmethod
        def get_impl_cls() -> type:
            return Zeroing

    return SideBySide


def exact_attention(config: Any) -> Any:
    """Return vLLM's FlashAttention as kernels.chunk.Attend, or None where there is none."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    version = get_flash_attn_version(head_size=config.model_config.get_head_size())
    if version is None:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
        n, m = len(query), len(key)
        starts = [_one_sequence(size, query.device) for size in (n, m)]
        output, total = flash_attn_varlen_func(
            query, key, value, n, starts[0], m, starts[1], softmax_scale=scaling, causal=causal,
            return_softmax_lse=True, fa_version=version,
        )  # fmt: skip
        return output, total

    return attend


@lru_cache(maxsize=64)
def _one_sequence(n_tokens: int, device: torch.device) -> Tensor:
    """Return where a batch's only sequence begins and ends; all layers of a step ask for the same."""
    return torch.tensor([0, n_tokens], dtype=torch.int32, device=device)


def register_spec(spec: type, manager: type) -> None:
    """Tell vLLM which manager hands out the pages of a spec; layers of another spec never share its group."""
    # A registry that is not empty is taken for complete, so vLLM's own specs must be in it first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
