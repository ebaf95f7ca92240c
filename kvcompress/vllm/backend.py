"""The attention backends that vLLM runs for compressed layers: one for packed pages, which attends, one for exact
pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.vllm import reference
from kvcompress.vllm.fused import FusedLayer, FusedModel, why_not_fused
from kvcompress.vllm.layers import CompressedAttention, CompressedModel
from kvcompress.vllm.names import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    exact_attention,
    get_forward_context,
    init_logger,
    reshape_and_cache_flash,
)
from kvcompress.vllm.specs import ExactSpec
from kvcompress.vllm.steps import EncodeClock, Step

_logger = init_logger("vllm.kvcompress")
#: What FusedModel allocates beside the pages, at most: absorbed queries, sums, a tile of rebuilt tokens.
_KERNEL_BYTES = 1 << 29


@dataclass(slots=True)
class PackedMetadata:
    """The packed pages of a step's sequences: int32 [n, most pages], by position."""

    table: Tensor


class PackedBuilder(AttentionMetadataBuilder):
    """Notes the table of packed pages; layers of other page sizes have builders of their own, but one table."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Steps of generation are recorded where the kernels take all layers; the reference reads the host's
        numbers."""
        fused = reason_for_reference(vllm_config) is None
        return AttentionCGSupport.UNIFORM_BATCH if fused else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        metadata = PackedMetadata(common_attn_metadata.block_table_tensor)
        model_of(self.vllm_config).packed_table = metadata.table
        return metadata


class ExactBuilder(PackedBuilder):
    """Works out a step for all layers, and encodes what generation completed in the steps before."""

    kv_cache_spec: ExactSpec

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.most_queries = 1 + vllm_config.num_speculative_tokens
        self.reorder_batch_threshold = self.most_queries  # generation comes first in a batch
        self._clock = EncodeClock(kv_cache_spec.recent, self.most_queries)
        reason = reason_for_reference(vllm_config)
        if reason is not None and device.type != "cpu":
            _logger.warning("kvcompress: attention runs in its slow torch reference: %s.", reason)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common, model = common_attn_metadata, model_of(self.vllm_config)
        packed_table, model.packed_table = model.packed_table, None
        assert packed_table is not None, "vLLM builds the packed pages' metadata first, as their layers come first"
        n_rows = len(common.seq_lens)
        step = Step(
            n_tokens=common.num_actual_tokens,
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            exact_table=common.block_table_tensor[:n_rows],
            packed_table=packed_table[:n_rows],
            slots=common.slot_mapping,
            recent=self.kv_cache_spec.recent,
            most_queries=self.most_queries,
        )
        lengths = common.seq_lens_cpu_upper_bound
        lengths = common.seq_lens.cpu() if lengths is None else lengths
        starts = common.query_start_loc_cpu
        due = self._clock.due((lengths - (starts[1:] - starts[:-1])).clamp_min(0))
        fused = fused_of(model, self.vllm_config)
        if fused is not None:
            self._begin_fused(fused, step, starts, due)
        elif due:
            self._encode_completed(step)
        return step

    def _begin_fused(self, fused: FusedModel, step: Step, starts: Tensor, due: bool) -> None:
        """Encode if it is due; note which first tokens are of generation. starts: the step's, on the host."""
        if due:
            fused.encode_completed(step)
        is_chunk = (starts[1:] - starts[:-1]) > self.most_queries
        n_rows = int(is_chunk.int().argmax()) if bool(is_chunk.any()) else len(is_chunk)
        # A recorded step has its own number of tokens, those of padding included.
        step.n_generating = step.n_tokens if n_rows == len(is_chunk) else int(starts[n_rows])
        if step.n_generating:
            step.query_tokens = fused.begin(step, step.n_generating)
        if step.n_generating < step.n_tokens:
            step.chunks = fused.contexts(step)

    def _encode_completed(self, step: Step) -> None:
        rows = {row.start: row for row in step.rows}
        starts = step.starts.tolist()
        for blocks in step.completed().tolist():
            found = [(rows[starts[i]], block) for i, block in enumerate(blocks) if block >= 0 and starts[i] in rows]
            for layer in compressed_layers(self.vllm_config) if found else ():
                cache = layer.kvcompress.cache(layer.kv_cache)
                for row, block in found:
                    reference.encode_block(cache, row, block)


def model_of(config: Any) -> CompressedModel:
    """Return what the model's compressed layers share."""
    model: CompressedModel = next(compressed_layers(config)).kvcompress.model
    return model


def compressed_layers(config: Any) -> Any:
    """Yield the model's compressed layers."""
    layers = config.compilation_config.static_forward_context.values()
    return (layer for layer in layers if getattr(layer, "kvcompress", None) is not None)


def reason_for_reference(config: Any) -> str | None:
    """Return why a model's attention runs in the reference, None where the kernels take all of its layers."""
    dtype, sinks = config.model_config.dtype, model_of(config).source.plan.sinks
    for layer in compressed_layers(config):
        own = layer.kvcompress
        reason = why_not_fused(own.codecs, layer.num_heads, own.layout.n_blocks, sinks, own.device, dtype)
        if reason is not None:
            return f"{layer.layer_name}: {reason}"
    return None


def fused_of(model: CompressedModel, config: Any) -> FusedModel | None:
    """Return the kernels' view of the model's pages, made anew when vLLM has bound others; None for the reference."""
    layers = list(compressed_layers(config))
    exact = layers[0].kvcompress.exact.kv_cache
    if not exact.is_cuda or reason_for_reference(config) is not None:
        return None
    if model.fused is not None and model.fused.pages == exact.data_ptr():
        return model.fused
    most_queries = 1 + config.num_speculative_tokens
    views = {
        layer.kvcompress.exact.name: FusedLayer.of(
            layer.kvcompress.cache(layer.kv_cache),
            n_heads=layer.num_heads,
            scaling=layer.impl.scale,
            n_tokens=config.model_config.max_model_len,
            recent=model.source.plan.recent,
            most_queries=most_queries,
        )
        for layer in layers
    }
    most_rows = config.scheduler_config.max_num_seqs
    model.fused = FusedModel(views, most_queries * most_rows, most_rows, exact_attention(config))
    return model.fused


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
        if attn_metadata is None:  # a run that only measures memory: what the kernels will keep counts as used
            if output.is_cuda:
                torch.empty(_KERNEL_BYTES, dtype=torch.uint8, device=output.device)
            return output.fill_(0)
        compressed: CompressedAttention = layer.kvcompress
        step: Step = get_forward_context().attn_metadata[compressed.exact.name]
        tokens = slice(0, step.n_tokens)
        query, key, value = query[tokens], key[tokens], value[tokens]
        if compressed.model.fused is not None:
            self._forward_fused(compressed.model.fused, compressed, step, query, key, value, output, layer)
            return output
        cache = compressed.cache(kv_cache)
        reference.store_exact(cache, key, value, step.slots[tokens])
        # All are encoded before any attends: a sequence may share pages that another one fills in this very step.
        for row in step.rows:
            if step.is_chunk(row):
                reference.encode_chunk(cache, row, key[row.new], value[row.new])
        for row in step.rows:
            attended = reference.attend(cache, row, query[row.new], key[row.new], value[row.new], self.scale)
            output[row.new] = attended.reshape(output[row.new].shape).to(output.dtype)
        return output

    def _forward_fused(
        self, fused: FusedModel, compressed: CompressedAttention, step: Step, query: Tensor, key: Tensor,
        value: Tensor, output: Tensor, layer: Any,
    ) -> None:  # fmt: skip
        """The same by kernels. A step of generation reads no number of the host."""
        own = fused.layers[compressed.exact.name]
        slots = step.slots[: step.n_tokens]
        reshape_and_cache_flash(
            key, value, own.exact.keys, own.exact.values, slots, "auto", layer._k_scale, layer._v_scale
        )
        n = step.n_generating
        for row, _ in step.chunks:
            reference.encode_chunk(own.cache, row, key[row.new], value[row.new])
        output = output.view(-1, self.num_heads, self.head_size)
        if step.query_tokens is not None:
            fused.attend(own, query[:n], step.query_tokens, output[:n])
        for row, context in step.chunks:
            output[row.new] = fused.attend_chunk(own, context, query[row.new], key[row.new], value[row.new])
