"""The memory that a process was given of a GPU, kept as the driver sees it."""

from __future__ import annotations

import gc

import pytest
import torch

from kvcompress.calibration.memory import limited
from kvcompress.calibration.outside import outside_bytes
from kvcompress.errors import OptionError
from kvcompress.side_by_side import FEEDING, side_by_side

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run tests/gpu")
GIVEN = 3_000_000_000


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(autouse=True)
def alone() -> None:
    gc.collect()  # what an error's frames still hold
    torch.cuda.empty_cache()
    if used() - torch.cuda.memory_reserved() > GIVEN // 2:
        pytest.skip("others use this GPU")


@pytest.mark.parametrize("solves", [False, True])
def test_no_more_is_taken_than_was_given(solves: bool) -> None:
    seen, blocks = 0, []
    with pytest.raises(OptionError, match="too little"), limited("cuda", GIVEN, solves=solves):
        while True:
            blocks.append(torch.empty(1 << 26, dtype=torch.uint8, device="cuda"))
            seen = max(seen, used())
    assert GIVEN - 300_000_000 < seen <= GIVEN


def test_threads_that_fit_take_nothing_that_was_not_counted() -> None:
    outside_bytes(0, solves=True)
    before = used() - torch.cuda.memory_reserved()

    def fit(seed: int) -> torch.Tensor:
        x = torch.randn(64, 64, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        return torch.linalg.solve(x @ x.T + 64 * torch.eye(64, device="cuda"), torch.linalg.eigh(x @ x.T)[1])

    for _ in range(2):  # new threads each time
        side_by_side(fit, range(4 * FEEDING), width=64, device="cuda")
    assert used() - torch.cuda.memory_reserved() - before < 64_000_000
