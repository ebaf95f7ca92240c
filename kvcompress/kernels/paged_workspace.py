"""What attention over pages needs beside its arguments: memory of its launches, and which block attends to what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.kernels.launch_shapes import MOST_COLUMNS, UNIT_TOKENS, best_splits
from kvcompress.kernels.turned import COMBINE_MEMORY, COMBINE_THREADS


@dataclass(frozen=True, slots=True)
class Widths:
    """What one layer's launches leave to each other is counted in."""

    n_kv_heads: int
    n_passes: int
    group_columns: int
    head_dim: int
    key_sets: int
    value_sets: int
    n_exact_parts: int

    def combine_bytes(self, n_splits: int) -> int:
        """Return the shared memory of `combine` where query tokens share n_splits, see cuda/combine.cu."""
        n_floats = n_splits + self.n_exact_parts + 32 * self.value_sets + 2 * COMBINE_THREADS
        return 4 * self.group_columns * n_floats


@dataclass(frozen=True, slots=True)
class Part:
    """Query tokens that are attended to at once: n from `first` on. splits: int32 [n_splits, 3], of each its query
    token (-1: of none), which of its splits it is, and how many it has; starts: int32 [n + 1], the first of each."""

    first: int
    n: int
    splits: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory of a few launches, used by one layer after the other. n_turns: of the longest sequence, in turns.

    at_once: query tokens attended to by one launch. Columns of no query are read as well, and must hold numbers: zeros
    stay there, since nothing is ever written to them.
    """

    at_once: int
    n_turns: int
    n_passes: int
    absorbed: Tensor
    biases: Tensor
    exact_sums: Tensor
    exact_stats: Tensor
    stats: Tensor
    sums: Tensor
    all_splits: Tensor
    all_starts: Tensor

    @classmethod
    def of(
        cls, widths: Sequence[Widths], n_queries: int, n_turns: int, most_bytes: int, device: torch.device
    ) -> Workspace:
        """Return memory that fits layers of any of these widths. most_bytes: of absorbed queries."""
        n_passes = max(w.n_passes for w in widths)
        turn_bytes = max(w.n_passes * w.key_sets for w in widths) * 512
        at_once = max(1, min(n_queries, most_bytes // (n_turns * turn_bytes)))
        while (
            at_once > 1 and max(w.combine_bytes(n_splits(at_once, n_passes, device)) for w in widths) > COMBINE_MEMORY
        ):
            at_once -= 1
        most = max(n_splits(n, n_passes, device) for n in range(1, at_once + 1))
        exact = at_once * max(w.n_kv_heads * w.n_exact_parts * w.group_columns for w in widths)
        sums = max(w.n_passes * 32 * w.value_sets for w in widths)

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        n_parts = -(-n_queries // at_once)
        return cls(
            at_once,
            n_turns,
            n_passes,
            absorbed=zeros(at_once * n_turns * turn_bytes // 4, dtype=torch.int32),
            biases=zeros(at_once * n_turns * n_passes, MOST_COLUMNS, 4),
            exact_sums=zeros(exact, max(w.head_dim for w in widths)),
            exact_stats=zeros(exact, 2),
            stats=zeros(n_passes * most, 3, MOST_COLUMNS),
            sums=zeros(most * sums, MOST_COLUMNS),
            all_splits=zeros(n_parts, most, 3, dtype=torch.int32),
            all_starts=zeros(n_parts, at_once + 1, dtype=torch.int32),
        )

    def parts(self, n: int) -> Iterator[Part]:
        """Yield the parts of n query tokens."""
        for i, first in enumerate(range(0, n, self.at_once)):
            own = min(self.at_once, n - first)
            splits = self.all_splits[i, : n_splits(own, self.n_passes, self.all_splits.device)]
            yield Part(first, own, splits, self.all_starts[i, : own + 1])

    def schedule(self, encoded: Tensor) -> None:
        """Share the thread blocks out among query tokens by their packed tokens, [n] int32, once for all layers."""
        for part in self.parts(len(encoded)):
            share_out(encoded[part.first : part.first + part.n], part.splits, part.starts)


def n_splits(n: int, n_passes: int, device: torch.device) -> int:
    """Return how many splits n query tokens share: as many each as equally long ones take, and one more for the rest
    that dividing unequal ones leaves."""
    return n * (best_splits(n * n_passes, device) + 1)


def share_out(encoded: Tensor, splits: Tensor, starts: Tensor) -> None:
    """Write the schedule of query tokens with so many packed tokens, [n] int32, into Part.splits and Part.starts.

    No split is longer than the packed tokens of all, shared out among the splits beyond one for each query token.
    """
    n, most = len(encoded), len(splits)
    units = (encoded + (UNIT_TOKENS - 1)) // UNIT_TOKENS
    longest = ((units.sum() + (most - n - 1)) // (most - n)).clamp_min(1)
    own = (units + (longest - 1)) // longest
    starts[0].zero_()
    torch.cumsum(own, 0, dtype=torch.int32, out=starts[1:])
    split = torch.arange(most, dtype=torch.int32, device=encoded.device)
    token = torch.searchsorted(starts[1:], split, right=True, out_int32=True)
    known = token.clamp_max(n - 1)
    splits[:, 0] = torch.where(token < n, token, -1)
    splits[:, 1] = split - starts[known]
    splits[:, 2] = own[known]
