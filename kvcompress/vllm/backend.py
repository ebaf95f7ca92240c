"""The attention backends that vLLM runs for compressed layers: one for packed pages, which attends, one for exact
pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.kernels.paged import PagedLayer
from kvcompress.kernels.paged_layer import compile_layers
from kvcompress.vllm import reference
from kvcompress.vllm.attention import PackedAttention
from kvcompress.vllm.fused import FusedLayer, FusedModel, why_not_fused, why_rebuilt
from kvcompress.vllm.layers import CompressedAttention, CompressedModel
from kvcompress.vllm.names import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    exact_attention,
    init_logger,
    tensor_parallel_place,
)
from kvcompress.vllm.specs import ExactSpec
from kvcompress.vllm.steps import EncodeClock, Step

_logger = init_logger("vllm.kvcompress")


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
        """Steps of generation are recorded where kernels decode all layers; what else there is reads numbers of the
        host."""
        slow = reason_for_reference(vllm_config) or reason_for_rebuilding(vllm_config)
        return AttentionCGSupport.UNIFORM_BATCH if slow is None else AttentionCGSupport.NEVER

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
        if device.type != "cpu":
            _warn(vllm_config)

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
            longest=self.vllm_config.model_config.max_model_len,
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
        if not fused.recordable:
            step.chunks = fused.contexts(step)
            return
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
    model, dtype = model_of(config), config.model_config.dtype
    if model.agreed:
        return model.slow
    sinks = model.source.plan.sinks
    reason = _first_reason(config, lambda layer, own: why_not_fused(own.codecs, sinks, own.device, dtype))
    return model.agree(reason, next(compressed_layers(config)).kvcompress.device)


def reason_for_rebuilding(config: Any) -> str | None:
    """Return why generation attends as prompts do, to rebuilt pages; None where kernels decode all layers."""
    return _first_reason(
        config, lambda layer, own: why_rebuilt(own.codecs, layer.num_heads, own.layout.n_blocks, own.device)
    )


def _first_reason(config: Any, reason_of: Callable[[Any, CompressedAttention], str | None]) -> str | None:
    reasons = ((layer, reason_of(layer, layer.kvcompress)) for layer in compressed_layers(config))
    return next((f"{layer.layer_name}: {reason}" for layer, reason in reasons if reason is not None), None)


def _warn(config: Any) -> None:
    """Say in the log what is slower than it might be, and why."""
    reason = reason_for_reference(config)
    if reason is not None:
        _logger.warning("kvcompress: attention runs in its slow torch reference: %s.", reason)
        return
    reason = reason_for_rebuilding(config)
    if reason is not None:
        _logger.warning(
            "kvcompress: generation rebuilds a sequence's pages for each of its tokens, which is slow: %s. "
            "compress --for vllm makes a plan that is decoded without.", reason,
        )  # fmt: skip


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
    scheduler = config.scheduler_config
    most_rows = scheduler.max_num_seqs
    _compile(views)
    model.fused = FusedModel(views, most_queries * most_rows, most_rows, exact_attention(config))
    _warm_up(model.fused, scheduler.max_num_batched_tokens)
    return model.fused


def _compile(views: Mapping[str, FusedLayer]) -> None:
    """Compile what decodes the layers, of all at once; ranks share the work."""
    start = time.monotonic()
    rank, n_ranks = tensor_parallel_place()
    paged = [view.decode for view in views.values() if isinstance(view.decode, PagedLayer)]
    n_made = compile_layers(paged, rank=rank, n_ranks=n_ranks)
    if n_made:
        _logger.info("kvcompress: compiled kernels for %d layouts in %.1f s.", n_made, time.monotonic() - start)


def _warm_up(fused: FusedModel, most_tokens: int) -> None:
    """Compile what encodes tokens and rebuilds them: the first request would wait for it otherwise."""
    start = time.monotonic()
    n_sets = fused.warm_up(most_tokens)
    torch.cuda.synchronize()
    _logger.info("kvcompress: encodes %d sets of levels, ready after %.1f s.", n_sets, time.monotonic() - start)


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
