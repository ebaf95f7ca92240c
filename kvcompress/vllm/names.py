"""Everything of vLLM that kvcompress touches, and which versions have it under these names. Nothing else imports
vLLM."""

from __future__ import annotations

from vllm._custom_ops import reshape_and_cache_flash
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import extract_layer_index
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
    "MultipleOf",
    "Request",
    "SingleTypeKVCacheManager",
    "SlidingWindowSpec",
    "VllmConfig",
    "extract_layer_index",
    "get_current_vllm_config",
    "get_forward_context",
    "init_logger",
    "register_spec",
    "reshape_and_cache_flash",
    "resolve_block_hashes",
    "tensor_parallel_place",
]


def tensor_parallel_place() -> tuple[int, int]:
    """Return this process's rank in its tensor parallel group, and how many ranks there are."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def register_spec(spec: type, manager: type) -> None:
    """Tell vLLM which manager hands out the pages of a spec; layers of another spec never share its group."""
    # A registry that is not empty is taken for complete, so vLLM's own specs must be in it first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
