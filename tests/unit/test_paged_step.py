"""A step worked out by one launch, in Triton's interpreter, against the engine's torch reference."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.errors import OptionError
from kvcompress.kernels.paged_step import StepTokens, begin_step
from kvcompress.kernels.paged_workspace import Widths, Workspace
from kvcompress.vllm.pages import visible_packed
from kvcompress.vllm.steps import Step

#: Where the Triton of this process runs: TRITON_INTERPRET=0 for a GPU.
DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
WIDTHS = Widths(2, 1, 2, 64, 1, 1, 1)


def workspace(n_queries: int, at_once: int) -> Workspace:
    made = Workspace.of([WIDTHS], n_queries, 4, at_once * 4 * 512, DEVICE)
    assert made.at_once == at_once
    return made


@pytest.mark.parametrize("seed", range(6))
def test_a_step_is_that_of_the_reference(seed: int) -> None:
    torch.manual_seed(seed)
    n_rows, recent, at_once = int(torch.randint(1, 40, ())), 64, (3, 7, 64)[seed % 3]
    new = torch.randint(0, 4, (n_rows,))  # sequences without new tokens, and with several
    if seed == 0:
        new.fill_(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), new.cumsum(0)])
    computed = torch.randint(0, 9000, (n_rows,)) * (torch.rand(n_rows) > 0.2)
    most = 290
    table = torch.randint(1, 5000, (n_rows, most))
    for row in range(n_rows):  # prefixes that were found without exact pages of their last tokens
        if torch.rand(()) < 0.4:
            table[row, : int(computed[row]) // 32] = 0
    n_real = int(starts[-1])
    n_tokens = min(64, n_real + 3)  # padded, as for a recorded graph
    args = [x.to(DEVICE, torch.int32) for x in (starts, computed + new, table)]
    made, alone = workspace(64, at_once), workspace(64, at_once)
    into = StepTokens.of(64, 64, DEVICE)
    for x in (into.rows, into.lengths, into.encoded, into.packed, into.sinks):
        x.fill_(-7)
    begin_step(*args, recent=recent, n_tokens=n_tokens, into=into, workspace=made)

    step = Step(n_real, *args, args[2], args[2], recent, 1, 32 * most)  # type: ignore[call-arg]
    token = torch.arange(n_tokens, dtype=torch.int32, device=DEVICE)
    row, length, packed = step.query_tokens_of(token)
    assert torch.equal(into.lengths[:n_tokens], length) and torch.equal(into.encoded[:n_tokens], packed)
    assert torch.equal(into.rows[:n_tokens][length > 0], row[length > 0])
    assert torch.equal(into.packed[:n_rows], visible_packed(step.computed, args[2], recent))
    assert torch.equal(into.sinks[:n_rows], args[2][:, 0])
    assert (into.rows[n_tokens:] == -7).all() and (into.packed[n_rows:] == -7).all()
    alone.schedule(packed)
    for ours, expected in zip(made.parts(n_tokens), alone.parts(n_tokens), strict=True):
        assert torch.equal(ours.starts, expected.starts)
        used = expected.splits[:, 0] >= 0
        assert torch.equal(ours.splits[used], expected.splits[used]) and (ours.splits[~used, 0] == -1).all()


def test_a_step_that_does_not_fit_is_refused() -> None:
    into, starts = StepTokens.of(4, 4, DEVICE), torch.arange(6, dtype=torch.int32, device=DEVICE)
    table = torch.ones(5, 3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(OptionError, match="5 sequences does not fit room for 4 and 4"):
        begin_step(starts, starts[1:], table, recent=64, n_tokens=4, into=into, workspace=workspace(4, 4))
