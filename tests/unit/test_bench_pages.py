"""What `bench` times over pages, through the emulator and Triton's interpreter: the same tokens, one layer."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs triton, for its interpreter")

from kvcompress.bench import pages
from kvcompress.bench.workload import Shape
from kvcompress.kernels import paged_layer, turned
from kvcompress.runtime import fast
from tests import emulator

SHAPE = Shape("small", 4, 2, 64, 1, 256, 512, 100)
SIZES = {"turn": 128, "page_blocks": 4, "device": torch.device("cpu"), "dtype": torch.float16}


@pytest.fixture
def emulated(monkeypatch: Any) -> None:
    if not emulator.available():
        pytest.skip("needs g++ 12, for the emulator")
    for module in (fast, paged_layer):
        monkeypatch.setattr(module, "compiler_works", lambda device: True)
    monkeypatch.setattr(paged_layer, "kernels_apply", lambda device: True)
    monkeypatch.setattr(turned, "_kernels", emulator.kernels)


@pytest.mark.usefixtures("emulated")
def test_pages_hold_what_the_tensor_holds() -> None:
    counts = {8: 4, 4: 28}
    timing = pages.time_pages(SHAPE, counts, counts, keep=0.125, context=160, batch=2, **SIZES)  # type: ignore[arg-type]
    assert timing.difference < 1e-3
    assert min(timing.microseconds, timing.contiguous_microseconds, timing.schedule_microseconds) > 0


@pytest.mark.usefixtures("emulated")
def test_chunks_are_timed_over_a_pool() -> None:
    counts = {4: 28}
    pool = pages.random_pool(SHAPE, counts, counts, context=64, batch=1, **SIZES)  # type: ignore[arg-type]
    timing = pages.time_chunk(pool, keep=0.125, n_new=8, tile=64)
    assert timing.context == 128 and timing.n_new == 8
    assert min(timing.rebuild_microseconds, timing.microseconds, timing.exact_microseconds) > 0


@pytest.mark.parametrize(("keep", "blocks"), [(0.0625, 16), (0.125, 8), (0.13, 8), (0.25, 4), (0.5, 4)])
def test_a_page_takes_as_much_as_its_exact_tokens(keep: float, blocks: int) -> None:
    assert pages.blocks_of_page(keep) == blocks
