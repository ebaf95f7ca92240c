"""The one line of the log that says that a cache is compressed, and what that is worth."""

from __future__ import annotations

from torch import Tensor

from kvcompress.model.model_spec import OwnLayer
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.layers import CompressedAttention
from kvcompress.vllm.names import VllmConfig, init_logger, tensor_parallel_place
from kvcompress.vllm.source import Source

_logger = init_logger("vllm.kvcompress")


def say(config: VllmConfig, layer: CompressedAttention, exact: Tensor) -> None:
    """Log keep, bytes a token, and how many tokens fit; exact: a layer's exact pages, as vLLM gave them to it.

    Pages that are no more than vLLM needs to see what its CUDA graphs take are not spoken of. Of several ranks the
    first one speaks for all.
    """
    if exact.shape[0] != config.cache_config.num_gpu_blocks or tensor_parallel_place()[0] > 0:
        return
    spec, own_layers = layer.exact.spec, layer.model.source.plan.own_layers
    length, number_bytes = config.model_config.max_model_len, exact.element_size()
    kept = sum(own.width for own, _ in layer.model.sites.values())  # of all numbers of a token, this rank's
    block_bytes = exact.stride(0) * number_bytes * sum(s.width for s in layer.model.source.plan.sites) // kept
    line = summary(
        layer.model.source,
        length=length,
        n_blocks=exact.shape[0],
        block_bytes=block_bytes,
        page_tokens=layer.layout.n_tokens,
        exact_pages=spec.max_memory_usage_bytes(config) // spec.page_size_bytes,
        window_pages=window_pages(own_layers, length, block_bytes, number_bytes),
    )
    _logger.info("%s", line)


def window_pages(own_layers: tuple[OwnLayer, ...], length: int, block_bytes: int, number_bytes: int) -> int:
    """Return the blocks that a sequence holds for layers with a sliding window: as many layers share one as fit."""
    if not own_layers:
        return 0
    page_bytes = BLOCK_TOKENS * max(own.numbers for own in own_layers) * number_bytes
    n_groups = -(-len(own_layers) // max(1, block_bytes // page_bytes))
    held = min(length, max(own.window or length for own in own_layers))
    return n_groups * (-(-held // BLOCK_TOKENS) + 1)


def summary(
    source: Source, *, length: int, n_blocks: int, block_bytes: int, page_tokens: int, exact_pages: int,
    window_pages: int = 0,
) -> str:  # fmt: skip
    """Return the line.

    length: tokens of a sequence, the most that the engine takes; n_blocks: of the pool, of block_bytes each;
    page_tokens: packed tokens of a block; exact_pages, window_pages: blocks that a sequence holds beside its packed
    ones, of exact tokens and of layers that keep a sliding window.
    """
    plan = source.plan
    n_fit = int(n_blocks / (-(-length // page_tokens) + exact_pages + window_pages) * length)
    own_bytes = length * plan.original_bytes_per_token + plan.own_bytes(length)
    n_own = n_blocks * block_bytes * length // own_bytes
    windows = f"{len(plan.own_layers)} layers keep a sliding window, not compressed; " if window_pages else ""
    return (
        f"kvcompress: the KV cache is compressed (keep {plan.keep:.4g}, {source.directory}): "
        f"{block_bytes / page_tokens:,.0f} bytes a token, padding included, against {plan.original_bytes_per_token:,}; "
        f"{windows}{n_fit:,} tokens fit in sequences of {length:,}, sinks and window included, against {n_own:,} "
        f"({n_fit / max(1, n_own):.2f} times)."
    )
