"""What a compressed layer computes in vLLM: it stores a step's tokens, encodes what they complete, and attends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompress.vllm import reference, refusals
from kvcompress.vllm.fused import FusedModel
from kvcompress.vllm.layers import CompressedAttention
from kvcompress.vllm.names import AttentionImpl, get_forward_context, reshape_and_cache_flash
from kvcompress.vllm.source import UNCOMPRESSED
from kvcompress.vllm.steps import Step

if TYPE_CHECKING:
    from kvcompress.vllm.backend import PackedMetadata

#: What FusedModel allocates beside the pages, at most: absorbed queries, sums, a tile of rebuilt tokens.
_KERNEL_BYTES = 1 << 29


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
        lacking = refusals.of_layer(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap,
            attn_type=attn_type, shares=kv_sharing_target_layer_name, sinks=more.get("sinks"),
        )  # fmt: skip
        refusals.refuse(lacking, UNCOMPRESSED)

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
        for row in (row for row, _ in step.chunks if step.is_chunk(row)):
            reference.encode_chunk(own.cache, row, key[row.new], value[row.new])
        output = output.view(-1, self.num_heads, self.head_size)
        if step.query_tokens is not None:
            fused.attend(own, query[:n], step.query_tokens, output[:n])
        for row, context in step.chunks:
            output[row.new] = fused.attend_chunk(own, context, query[row.new], key[row.new], value[row.new])
