"""A step of generation worked out on the device: what each query token sees, and who attends to what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.errors import OptionError
from kvcompress.kernels.launch_shapes import UNIT_TOKENS
from kvcompress.kernels.layout import BLOCK_TOKENS
from kvcompress.kernels.paged_workspace import Workspace, n_splits

_ROWS = 32
_SPLITS = 16


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Where begin_step writes, at addresses that a CUDA graph may read; int32. rows, lengths, encoded: of each query
    token, as in page_views.QueryTokens; sinks, packed: of each sequence, the page of its sinks and what its queries see
    packed."""

    rows: Tensor
    lengths: Tensor
    encoded: Tensor
    sinks: Tensor
    packed: Tensor

    @classmethod
    def of(cls, most_tokens: int, most_rows: int, device: torch.device) -> StepTokens:
        sizes = (most_tokens,) * 3 + (most_rows,) * 2
        return cls(*(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))


def begin_step(
    starts: Tensor, lengths: Tensor, exact_table: Tensor, *, recent: int, n_tokens: int, into: StepTokens,
    workspace: Workspace,
) -> None:  # fmt: skip
    """Write what the first n_tokens tokens of a step see, and share the splits of a workspace out among them.

    starts: int32 [>= n + 1], where each sequence's new tokens begin among those of the batch. lengths: int32 [n],
    tokens of each when the step is done. exact_table: int32 [n, most pages], exact pages by position // 32, 0 for none.
    Queries see packed what was older than the window before the step, in whole blocks, and where a prefix was found in
    the engine's cache without exact pages of its last tokens, those as well. One launch, no host read.
    """
    from kvcompress.kernels.stepping import step_kernel

    n_rows, n_pages = exact_table.shape
    if n_tokens > len(into.rows) or n_rows > len(into.sinks) or len(lengths) != n_rows or len(starts) <= n_rows:
        raise OptionError(
            f"a step of {n_tokens} query tokens and {n_rows} sequences does not fit room for {len(into.rows)} and "
            f"{len(into.sinks)}, or its {len(lengths)} lengths and {len(starts)} starts."
        )
    if n_tokens == 0 or n_rows == 0:
        return
    device, at_once = starts.device, workspace.at_once
    n_parts = -(-n_tokens // at_once)
    last = n_tokens - (n_parts - 1) * at_once
    most_last = n_splits(last, workspace.n_passes, device)
    most_whole = n_splits(at_once, workspace.n_passes, device) if n_parts > 1 else most_last
    tokens = max(16, 1 << (at_once - 1).bit_length())
    step_kernel[(n_parts, -(-max(most_whole, most_last) // _SPLITS))](
        starts, lengths, exact_table, into.rows, into.lengths, into.encoded, into.packed, into.sinks,
        workspace.all_splits, workspace.all_starts, exact_table.stride(0), n_pages, n_rows, n_tokens, recent, at_once,
        most_whole, most_last, workspace.all_splits.stride(0), workspace.all_starts.stride(0),
        TOKENS=tokens, ROWS=_ROWS, SPLITS=_SPLITS, UNIT=UNIT_TOKENS, AHEAD=recent // BLOCK_TOKENS + 2,
        num_warps=min(16, max(4, tokens // 32)),
    )  # fmt: skip
