"""How the launches that attend to keys in turns are shaped: which kernels, how many warps, what of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvcompress.kernels.group_layout import GroupLayout
from kvcompress.kernels.layout import BLOCK_TOKENS

#: Columns of one product of the matrix units: query heads of as many KV heads of a group as fit.
MOST_COLUMNS = 8
#: Tokens that a warp takes at once, at most; a turn is a multiple.
UNIT_TOKENS = 128
#: (warps of a thread block of `attend`, packed blocks that each takes at once), the fastest first: more than eight
#: warps do not have the registers they need, fewer wait for each instruction's result, and other numbers cannot share
#: most contexts out evenly.
_LAUNCHES = ((8, 4), (8, 2), (4, 4), (3, 4), (2, 4), (1, 4))
#: Places of a warp of `attend_numbers` for keys or values of one packed block, at most, and bytes of all of them: more
#: are no faster.
_MOST_SLOTS, _MOST_SLOT_BYTES = 8, 1 << 17
#: What is launched where there are codes, and where all components are float16 numbers; all but the first may begin
#: while the one before ends. A file of cuda/ each.
CODES = ("prepare", "attend", "combine")
NUMBERS = ("attend_numbers", "combine")


@dataclass(frozen=True, slots=True)
class Launch:
    """How the packed tokens are attended to. names: CODES or NUMBERS. warps: of a thread block, of which a
    multiprocessor has one. per_warp: of CODES the packed blocks that each takes at once, of NUMBERS its places for keys
    or values of a block. memory: shared, in bytes. absorbers: of NUMBERS the warps beside them, which absorb queries
    and attend to exact tokens. unit_tokens: those that a warp takes at once."""

    names: tuple[str, ...]
    warps: int
    per_warp: int
    memory: int

    @property
    def absorbers(self) -> int:
        return 0 if self.names == CODES else 4

    @property
    def unit_tokens(self) -> int:
        return BLOCK_TOKENS * (self.per_warp if self.names == CODES else 1)


def launch_of(
    n_heads: int, n_kv_heads: int, head_dim: int, keys: GroupLayout, values: GroupLayout, device: torch.device,
    *, page_blocks: int = 0,
) -> Launch | None:  # fmt: skip
    """Return the fastest launch for which there is room, None if there is none.

    page_blocks: where the cache lies in pages, packed blocks of one; then, and where a group takes several passes, it
    is of CODES in any case.
    """
    sizes = head_dim, n_kv_heads // len(keys.table), n_heads // n_kv_heads
    return _launch(sizes, keys.sets, values.sets, keys.n_words, values.n_words, device, page_blocks)


@lru_cache(maxsize=1024)
def _launch(
    sizes: tuple[int, int, int], key_sets: tuple[int, ...], value_sets: tuple[int, ...], key_words: int,
    value_words: int, device: torch.device, page_blocks: int,
) -> Launch | None:  # fmt: skip
    """Return what launch_of returns.

    sizes: head_dim, KV heads of a group, query heads of a KV head; key_words, value_words: of a block.
    """
    n_keys, n_values, room = sum(key_sets), sum(value_sets), _multiprocessors(device)[1]
    head_dim, group_heads, group_columns = sizes
    one_pass = group_heads * group_columns <= MOST_COLUMNS
    if one_pass and not page_blocks and not any(key_sets[1:] + value_sets[1:]):
        rows = turn_rows(group_columns)
        queries = 64 * rows * (16 * n_keys + 1)  # 2 BATCH_WORDS
        queries += 2 * head_dim * (group_heads * group_columns + 2 * rows + 2 * group_heads)  # INPUT_WORDS
        slot = 4 * max(key_words, value_words)
        for warps in (4, 2, 1):
            slots = min(_MOST_SLOTS, min(_MOST_SLOT_BYTES, room - queries - 96 * warps) // (warps * slot))
            if slots >= 2:
                return Launch(NUMBERS, warps, slots, warps * max(slots * slot, 1024 * n_values) + queries)
        return None
    beyond = 4 * 128 * (max(0, n_values - n_keys) + 1)  # BEYOND in cuda/attend.cu
    for warps, blocks in _LAUNCHES:
        stage = 4 * (blocks * (key_words + value_words + 12) + 128 * n_keys)  # STAGE_WORDS
        memory = warps * max(stage, 1024 * n_values) + beyond
        if memory + 96 * warps <= room and not page_blocks % blocks:
            return Launch(CODES, warps, blocks, memory)
    return None


@lru_cache(maxsize=1024)
def best_splits(n_sequences: int, device: torch.device) -> int:
    """Return into how many parts each sequence is split, so that few multiprocessors are idle in the last round."""
    n_multiprocessors = _multiprocessors(device)[0]
    candidates = range(1, max(1, n_multiprocessors // n_sequences) + 8)

    # A split that fills a tenth of a percent more is not worth its sums.
    def busy(n: int) -> float:
        blocks = n * n_sequences
        return blocks / (-(-blocks // n_multiprocessors) * n_multiprocessors) - 0.001 * n

    return max(candidates, key=busy)


def pass_heads(group_columns: int) -> int:
    """Return of how many KV heads, of so many query heads each, the queries are the columns of one product."""
    return MOST_COLUMNS // group_columns


def passes(n_heads: int, n_kv_heads: int, n_groups: int) -> int:
    """Return how many passes over their groups' codes a token's query heads take, of all groups together."""
    return n_groups * -(-(n_kv_heads // n_groups) // pass_heads(n_heads // n_kv_heads))


def turn_rows(group_columns: int) -> int:
    """Return of how many turns a warp absorbs the queries of one KV head at once, as the 16 rows of a product."""
    return 16 // (1 << (group_columns - 1).bit_length())


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """Return how many there are and the bytes of shared memory a block may have; where tests emulate, of an H100."""
    if device.type != "cuda":
        return 4, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
