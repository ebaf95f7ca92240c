"""The attention backends that vLLM runs for compressed layers: one for packed pages, which attends, one for exact
pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.vllm import reference
from kvcompress.vllm.layers import CompressedAttention, CompressedModel
from kvcompress.vllm.names import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    get_forward_context,
)
from kvcompress.vllm.specs import ExactSpec
from kvcompress.vllm.steps import Step


@dataclass(slots=True)
class PackedMetadata:
    """The packed pages of a step's sequences: int32 [n, most pages], by position."""

    table: Tensor


class PackedBuilder(AttentionMetadataBuilder):
    """Notes the table of packed pages; layers of other page sizes have builders of their own, but one table."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        metadata = PackedMetadata(common_attn_metadata.block_table_tensor)
        _model_of(self.vllm_config).packed_table = metadata.table
        return metadata


class ExactBuilder(AttentionMetadataBuilder):
    """Works out a step for all layers, and encodes what generation completed in the step before."""

    kv_cache_spec: ExactSpec

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common = common_attn_metadata
        packed_table = _model_of(self.vllm_config).packed_table
        assert packed_table is not None, "vLLM builds the packed pages' metadata first, as their layers come first"
        step = Step.of(
            n_tokens=common.num_actual_tokens,
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            exact_table=common.block_table_tensor,
            packed_table=packed_table,
            slots=common.slot_mapping,
            recent=self.kv_cache_spec.recent,
            most_queries=1 + self.vllm_config.num_speculative_tokens,
        )
        self._encode_completed(step)
        return step

    def _encode_completed(self, step: Step) -> None:
        blocks = step.blocks_to_encode()
        if not blocks:
            return
        for layer in compressed_layers(self.vllm_config):
            cache = layer.kvcompress.cache(layer.kv_cache)
            for row, block in blocks:
                reference.encode_block(cache, row, block)


def _model_of(config: Any) -> CompressedModel:
    model: CompressedModel = next(compressed_layers(config)).kvcompress.model
    return model


def compressed_layers(config: Any) -> Any:
    """Yield the model's compressed layers."""
    layers = config.compilation_config.static_forward_context.values()
    return (layer for layer in layers if getattr(layer, "kvcompress", None) is not None)


class PackedBackend(AttentionBackend):
    """Pages of packed codes. vLLM wants a name that it knows; on a CPU there is but one."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(32)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type:
        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type:
        return PackedBuilder


class ExactBackend(PackedBackend):
    """Pages of exact tokens; the layers that have them never attend themselves."""

    @staticmethod
    def get_builder_cls() -> type:
        return ExactBuilder


class PackedAttention(AttentionImpl):
    """Stores a step's tokens, encodes what they complete, and attends to packed and exact ones."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a soft cap of its scores": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != "decoder",
            "the cache of another layer": kv_sharing_target_layer_name is not None,
            "learned sinks": more.get("sinks") is not None,
        }
        for what, found in refused.items():
            if found:
                raise OptionError(
                    f"a layer of the compressed model has {what}, which compressed attention lacks in vLLM."
                )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PackedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [n_tokens, heads, head_dim]; key, value: [n_tokens, KV heads, head_dim]; output like query,
        written."""
        if attn_metadata is None:  # a run that only measures memory
            return output.fill_(0)
        compressed: CompressedAttention = layer.kvcompress
        step: Step = get_forward_context().attn_metadata[compressed.exact.name]
        cache = compressed.cache(kv_cache)
        reference.store_exact(cache, key[: step.n_tokens], value[: step.n_tokens], step.slots[: step.n_tokens])
        # All are encoded before any attends: a sequence may share pages that another one fills in this very step.
        for row in step.rows:
            if step.is_chunk(row):
                reference.encode_chunk(cache, row, key[row.new], value[row.new])
        for row in step.rows:
            attended = reference.attend(cache, row, query[row.new], key[row.new], value[row.new], self.scale)
            output[row.new] = attended.reshape(output[row.new].shape).to(output.dtype)
        return output
