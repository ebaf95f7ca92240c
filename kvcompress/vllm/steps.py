"""What a step brings to each sequence of the batch, worked out once for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvcompress.plan import BLOCK_TOKENS
from kvcompress.vllm.pages import visible_packed
from kvcompress.vllm.reference import Row


@dataclass(slots=True)
class Step:
    """One step of the batch; n sequences, each with its new tokens behind one another among n_tokens.

    starts: int32 [n + 1], where each one's new tokens begin. lengths: int32 [n], tokens when the step is done, the new
    ones included. exact_table, packed_table: int32 [n, most pages]. slots: [n_tokens], exact page * 32 + place of each
    new token. n_packed: int32 [n], what the sequence's queries see packed. most_queries: query tokens of a sequence
    that generates.
    """

    n_tokens: int
    starts: Tensor
    lengths: Tensor
    exact_table: Tensor
    packed_table: Tensor
    slots: Tensor
    n_packed: Tensor
    most_queries: int
    _rows: list[Row] | None = field(default=None)

    @classmethod
    def of(
        cls,
        *,
        n_tokens: int,
        starts: Tensor,
        lengths: Tensor,
        exact_table: Tensor,
        packed_table: Tensor,
        slots: Tensor,
        recent: int,
        most_queries: int,
    ) -> Step:
        computed = lengths - (starts[1:] - starts[:-1])
        n_packed = visible_packed(computed.clamp_min(0), exact_table, recent)
        return cls(n_tokens, starts, lengths, exact_table, packed_table, slots, n_packed, most_queries)

    @property
    def rows(self) -> list[Row]:
        """The sequences that have new tokens, with numbers of the host: for the reference, made once a step."""
        if self._rows is None:
            starts, lengths, packed = (x.tolist() for x in (self.starts, self.lengths, self.n_packed))
            pages, exact = self.packed_table.long(), self.exact_table.long()
            self._rows = [
                Row(start, stop - start, length - (stop - start), seen, pages[i], exact[i])
                for i, (start, stop, length, seen) in enumerate(zip(starts, starts[1:], lengths, packed, strict=False))
                if stop > start
            ]
        return self._rows

    def is_chunk(self, row: Row) -> bool:
        """Whether a row's blocks are encoded in its own step, from its own tokens; see blocks_to_encode."""
        return row.n_new > self.most_queries

    def blocks_to_encode(self) -> list[tuple[Row, int]]:
        """Return the blocks that generation may have completed in the step before, to be encoded from their exact
        pages.

        A step of generation brings a sequence at most most_queries tokens, so its newest whole block was completed by
        the last one if fewer tokens than that follow it. A block that was encoded already gets the same codes again.
        """
        found = []
        for row in self.rows:
            block = row.computed // BLOCK_TOKENS - 1
            if block >= 0 and row.computed % BLOCK_TOKENS < self.most_queries and int(row.exact[block]) > 0:
                found.append((row, block))
        return found
