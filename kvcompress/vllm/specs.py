"""What vLLM must know of the two kinds of pages: their bytes, and which tokens of a sequence have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.names import AttentionSpec, FullAttentionSpec, VllmConfig
from kvcompress.vllm.pages import exact_pages


@dataclass(frozen=True, kw_only=True)
class PackedSpec(FullAttentionSpec):
    """Pages of packed codes: one state of any number of bytes for all tokens of a page.

    most_queries: query tokens that a sequence has in a step of generation, 1 without speculation. lag: tokens before a
    step that may not be encoded yet; see managers.py.
    """

    most_queries: int = 1
    lag: int = 0

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different pages are merged by vLLM's UniformTypeKVCacheSpecs only")
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class ExactSpec(AttentionSpec):
    """Pages of 32 exact tokens: those of the first `sinks` tokens, and of the `recent` last ones with the block that
    they begin in."""

    sinks: int
    recent: int

    @property
    def sink_pages(self) -> int:
        return -(-self.sinks // BLOCK_TOKENS)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that a sequence keeps."""
        tokens = vllm_config.model_config.max_model_len + vllm_config.num_speculative_tokens
        pages = min(exact_pages(self.sinks, self.recent), -(-tokens // BLOCK_TOKENS))
        return pages * self.page_size_bytes
