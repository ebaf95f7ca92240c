"""What a step brings to each sequence of the batch, worked out once for all layers, and when its blocks are encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.kernels.chunk import Context
from kvcompress.kernels.page_views import QueryTokens
from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.pages import visible_packed
from kvcompress.vllm.reference import Row

#: Steps of generation between two encodings of what it completed, where the window leaves that much time.
ENCODE_EVERY = 16


def encodes_late(recent: int, most_queries: int) -> bool:
    """Return whether generation may encode a block some steps after it was completed: queries still see it exactly."""
    return most_queries == 1 and recent >= 2 * BLOCK_TOKENS


def encoding_lag(recent: int, most_queries: int) -> int:
    """Return how many tokens before a step's first one may not be encoded yet, where generation completed them."""
    return 2 * ENCODE_EVERY if encodes_late(recent, most_queries) else 0


@dataclass(slots=True)
class EncodeClock:
    """Says in which steps generation's blocks are encoded, from numbers that the host has.

    Encoding launches several kernels a layer, so it is done for all sequences together, every ENCODE_EVERY steps and
    whenever the batch is another one: a sequence that pauses has nothing left to encode when it comes back.
    """

    recent: int
    most_queries: int
    _last: Tensor | None = None
    _since: int = 0

    def due(self, computed: Tensor) -> bool:
        """computed: tokens of each sequence before this step, on the host, an upper bound at least."""
        if not encodes_late(self.recent, self.most_queries):
            return bool(((computed >= BLOCK_TOKENS) & (computed % BLOCK_TOKENS < self.most_queries)).any())
        steady = self._last is not None and torch.equal(computed, self._last + 1)
        self._last, self._since = computed.clone(), self._since + 1
        if steady and self._since < ENCODE_EVERY:
            return False
        self._since = 0
        return bool((computed >= BLOCK_TOKENS).any())


def completed_blocks(computed: Tensor, table: Tensor, recent: int, most_queries: int) -> Tensor:
    """Return blocks that generation completed and may not have encoded yet, int32 [k, n], -1 for none.

    computed, table: as visible_packed takes them. A block that was encoded already gets the same codes again.
    """
    computed = computed.to(torch.int32)
    late = encodes_late(recent, most_queries)
    back = torch.arange(1, 3 if late else 2, dtype=torch.int32, device=computed.device)
    block = computed // BLOCK_TOKENS - back[:, None]
    page = table.gather(1, block.clamp(0, table.shape[1] - 1).T.long()).T
    wanted = (block >= 0) & (page > 0)
    if late:  # what queries see packed was encoded in time, and its page may be another sequence's by now
        wanted &= block >= (computed - recent).clamp_min(0) // BLOCK_TOKENS
    else:
        wanted &= computed % BLOCK_TOKENS < most_queries
    return torch.where(wanted, block, -1)


@dataclass(slots=True)
class Step:
    """One step of the batch; n sequences, each with its new tokens behind one another among n_tokens.

    starts: int32 [n + 1], where each one's new tokens begin. lengths: int32 [n], tokens when the step is done, the new
    ones included. exact_table, packed_table: int32 [n, most pages]. slots: [n_tokens], exact page * 32 + place of each
    new token. most_queries: query tokens of a sequence that generates. longest: tokens that the tables have room for.
    n_generating, query_tokens, chunks: for the kernels; the first tokens are those of generation.
    """

    n_tokens: int
    starts: Tensor
    lengths: Tensor
    exact_table: Tensor
    packed_table: Tensor
    slots: Tensor
    recent: int
    most_queries: int
    longest: int
    n_generating: int = 0
    query_tokens: QueryTokens | None = None
    chunks: list[tuple[Row, Context]] = field(default_factory=list)
    _rows: list[Row] | None = field(default=None)

    @property
    def n_packed(self) -> Tensor:
        """What the queries of each sequence see packed, int32 [n]; of the kernels, begin_step works it out."""
        return visible_packed(self.computed, self.exact_table, self.recent)

    @property
    def computed(self) -> Tensor:
        """Tokens of each sequence before the step, int32 [n]."""
        return (self.lengths - (self.starts[1:] - self.starts[:-1])).clamp_min(0)

    @property
    def rows(self) -> list[Row]:
        """The sequences that have new tokens, with numbers of the host: waits for the device, once a step.

        Not those that are longer than their tables: vLLM's warm-up on a GPU (FlashInfer's autotuning) runs some where
        max_num_batched_tokens is more than max_num_seqs sequences of max_model_len have, and reads nothing of them.
        """
        if self._rows is None:
            numbers = (self.starts, self.lengths, self.n_packed, self.exact_table[:, 0])
            starts, lengths, packed, first = (x.tolist() for x in numbers)
            pages, exact = self.packed_table.long(), self.exact_table.long()
            self._rows = []
            for i, (start, stop) in enumerate(pairwise(starts[: len(lengths) + 1])):
                if stop > start and lengths[i] <= self.longest:
                    computed = lengths[i] - (stop - start)
                    row = Row(start, stop - start, computed, packed[i], pages[i], exact[i], first[i])
                    self._rows.append(row)
        return self._rows

    def is_chunk(self, row: Row) -> bool:
        """Whether a row's blocks are encoded in its own step, from its own tokens; those of others when the clock
        says."""
        return row.n_new > self.most_queries

    def completed(self) -> Tensor:
        return completed_blocks(self.computed, self.exact_table, self.recent, self.most_queries)

    def query_tokens_of(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each query token's sequence, how many tokens it sees, and how many of those packed: int32 [k] each.

        token: int32 [k], places in the batch; those where there is no token see none.
        """
        n_rows = len(self.lengths)
        row = torch.searchsorted(self.starts[1 : n_rows + 1].contiguous(), token, right=True, out_int32=True)
        row = row.clamp_max(n_rows - 1)
        behind = self.starts[row + 1] - 1 - token  # of the sequence's new tokens, those after this one
        length = self.lengths[row] - behind
        real = (token < self.starts[n_rows]) & (behind >= 0) & (length > 0)
        return row, length * real, self.n_packed[row] * real

    def blocks_in_pages(self, n_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the blocks of `completed` as kernels take them: [k * n] each, -1 for none, and the first's position.

        The exact page of each, its row among all rows of packed pages of n_blocks, and the position of its first token.
        """
        block = self.completed()
        place = block.clamp_min(0)
        source = self.exact_table.gather(1, place.T.long()).T
        page = self.packed_table.gather(1, (place // n_blocks).T.long()).T
        destination = page * n_blocks + place % n_blocks
        source, destination = (torch.where(block < 0, -1, x).flatten().to(torch.int32) for x in (source, destination))
        return source, destination, place.flatten() * BLOCK_TOKENS
