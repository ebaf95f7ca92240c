"""The one line of the log that says that a cache is compressed, and what that is worth."""

from __future__ import annotations

from torch import Tensor

from kvcompress.vllm.layers import CompressedAttention
from kvcompress.vllm.names import VllmConfig, init_logger
from kvcompress.vllm.source import Source

_logger = init_logger("vllm.kvcompress")


def say(config: VllmConfig, layer: CompressedAttention, exact: Tensor) -> None:
    """Log keep, bytes a token, and how many tokens fit; exact: a layer's exact pages, as vLLM gave them to it."""
    spec = layer.exact.spec
    line = summary(
        layer.model.source,
        length=config.model_config.max_model_len,
        n_blocks=exact.shape[0],
        block_bytes=exact.stride(0) * exact.element_size(),
        page_tokens=layer.layout.n_tokens,
        exact_pages=spec.max_memory_usage_bytes(config) // spec.page_size_bytes,
    )
    _logger.info("%s", line)


def summary(source: Source, *, length: int, n_blocks: int, block_bytes: int, page_tokens: int, exact_pages: int) -> str:
    """Return the line.

    length: tokens of a sequence, the most that the engine takes; n_blocks: of the pool, of block_bytes each;
    page_tokens: packed tokens of a block; exact_pages: blocks of exact tokens that a sequence holds beside its packed
    ones.
    """
    plan = source.plan
    n_fit = int(n_blocks / (-(-length // page_tokens) + exact_pages) * length)
    n_own = n_blocks * block_bytes // plan.original_bytes_per_token
    return (
        f"kvcompress: the KV cache is compressed (keep {plan.keep:.4g}, {source.directory}): "
        f"{block_bytes / page_tokens:,.0f} bytes a token, padding included, against {plan.original_bytes_per_token:,}; "
        f"{n_fit:,} tokens fit in sequences of {length:,}, sinks and window included, against {n_own:,} "
        f"({n_fit / max(1, n_own):.2f} times)."
    )
