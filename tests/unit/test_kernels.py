"""Decode attention kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton (pip install triton), for its interpreter")

from kvcompress.runtime.kernels.decode import packed_attention
from tests.packed_cases import Case, random_case

MIXED = {8: 3, 4: 40, 2: 67, 1: 21}


def run(case: Case, **kwargs) -> torch.Tensor:
    return packed_attention(
        case.query, case.keys, case.values, first=case.first, last=case.last, n_blocks=case.n_blocks,
        exact=case.exact, scaling=case.scaling, mask=case.mask, angles=case.angles, **kwargs,
    ).double()  # fmt: skip


def test_mixed():
    case = random_case(key_counts=MIXED, value_counts=MIXED)
    for n_s in (1, 2, None):
      out = run(case, n_splits=n_s)
      print(n_s, (out - case.expected).norm() / case.expected.norm())
    torch.testing.assert_close(out, case.expected, atol=3e-3, rtol=3e-3)
