"""Which pages a sequence holds, when they are given back, and what of them another sequence with the same prefix finds.

Packed pages are those of full attention. Of exact pages a sequence holds the ones of its sinks and of its window. A
prompt's chunk takes none for the tokens in between, which are encoded from the chunk itself: vLLM's null page stands
for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kvcompress.plan import BLOCK_TOKENS, n_encoded
from kvcompress.vllm.names import (
    BlockPool,
    FullAttentionManager,
    KVCacheBlock,
    Request,
    SingleTypeKVCacheManager,
    register_spec,
    resolve_block_hashes,
)
from kvcompress.vllm.specs import ExactSpec, PackedSpec


class PackedManager(FullAttentionManager):
    """Full attention whose pages are found by others only once all their codes are written.

    A chunk of a prompt is encoded in its own step. Generation encodes a block some time after it was completed, so a
    page that generation fills is offered later.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        if num_tokens - request.num_computed_tokens <= self.kv_cache_spec.most_queries:
            num_tokens = min(num_tokens, max(0, request.num_computed_tokens - self.kv_cache_spec.lag))
        super().cache_blocks(request, num_tokens, *args, **kwargs)


class ExactManager(SingleTypeKVCacheManager):
    """Hands out exact pages: sinks, the recent window, and the window before a chunk's last shareable boundary."""

    kv_cache_spec: ExactSpec

    def __init__(self, kv_cache_spec: ExactSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._released: dict[str, int] = {}  # of each request: pages before this one have been given back

    def _wanted(self, first: int, stop: int, n_tokens: int) -> list[bool]:
        """Return which of pages first..stop-1 are needed by the end of a step after which there are n_tokens tokens."""
        spec, align = self.kv_cache_spec, self.scheduler_block_size
        kept = set(range(spec.sink_pages))
        if self.enable_caching:
            # Where a longer prompt finds this one's prefix, and the same prompt again, whose last token is computed
            # anew.
            for boundary in {n_tokens // align * align, (n_tokens - 1) // align * align}:
                kept |= {*range(n_encoded(boundary, spec.recent) // BLOCK_TOKENS, boundary // BLOCK_TOKENS)}
        window = n_encoded(n_tokens, spec.recent) // BLOCK_TOKENS
        return [i in kept or i >= window for i in range(first, stop)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ())) or len(new_computed_blocks)
        wanted = self._wanted(held, -(-num_tokens // self.block_size), num_tokens_main_model)
        return sum(wanted) + self._get_num_evictable_blocks(new_computed_blocks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        assert num_external_computed_tokens == 0, "KV connectors are refused when the model is loaded"
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        self.req_to_blocks[request_id].extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Return the new pages in order, the null page for tokens that need none."""
        blocks = self.req_to_blocks[request_id]
        wanted = self._wanted(len(blocks), -(-num_tokens // self.block_size), num_tokens_main_model)
        taken = iter(self.block_pool.get_new_blocks(sum(wanted)))
        new = [next(taken) if want else self._null_block for want in wanted]
        blocks.extend(new)
        return new

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back the pages of tokens that left the window, those of the sinks excepted."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        spec = self.kv_cache_spec
        stop = min(n_encoded(processed_computed_tokens, spec.recent) // BLOCK_TOKENS, len(blocks))
        first = max(spec.sink_pages, self._released.get(request_id, 0))
        freed = [i for i in range(stop - 1, first - 1, -1) if not blocks[i].is_null]
        self.block_pool.free_blocks([blocks[i] for i in freed])
        for i in freed:
            blocks[i] = self._null_block
        self._released[request_id] = max(stop, first)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._released.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: ExactSpec,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        """Which full pages another sequence can use: sinks, and the window before a boundary that a prefix may end
        at."""
        align = alignment_tokens or BLOCK_TOKENS
        window = -(-kv_cache_spec.recent // BLOCK_TOKENS)
        per_segment = align // BLOCK_TOKENS

        def reachable(page: int) -> bool:
            return page < kv_cache_spec.sink_pages or page % per_segment >= per_segment - window

        return [reachable(page) for page in range(start_block, end_block)]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: ExactSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """A prefix of whole packed pages is found if its sinks are; its window is taken along if it is there.

        Without it the sequence sees the prefix's last tokens packed: nothing that lies in the cache must be computed
        again.
        """
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, BLOCK_TOKENS)
        length = max_length // alignment_tokens * alignment_tokens
        if drop_eagle_block:
            length = max(0, length - alignment_tokens)
        found: tuple[list[KVCacheBlock], ...] = tuple([block_pool.null_block] * 0 for _ in kv_cache_group_ids)
        sinks = min(kv_cache_spec.sink_pages, length // BLOCK_TOKENS)
        window = range(n_encoded(length, kv_cache_spec.recent) // BLOCK_TOKENS, length // BLOCK_TOKENS)
        cached = {i: block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in {*range(sinks), *window}}
        if length == 0 or not all(cached[i] for i in range(sinks)):
            return found, 0
        with_window = all(cached[i] for i in window)
        for group, blocks in enumerate(found):
            for i in range(length // BLOCK_TOKENS):
                block = cached.get(i) if i < sinks or with_window else None
                blocks.append(block[group] if block else block_pool.null_block)
        return found, length

    @classmethod
    def _get_num_evictable_blocks(cls, blocks: Sequence[KVCacheBlock]) -> int:
        return sum(block.ref_cnt == 0 and not block.is_null for block in blocks)


def register_managers() -> None:
    """Make vLLM use these managers for the specs; may be called more than once."""
    register_spec(PackedSpec, PackedManager)
    register_spec(ExactSpec, ExactManager)
