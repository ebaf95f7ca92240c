"""Sites fitted side by side: the results are those of one after the other, and torch's threads are as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from kvcompress import side_by_side as module
from kvcompress.side_by_side import fitting_device, side_by_side, solved


@pytest.fixture
def three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(three_threads: object) -> None:
    seen: set[int] = set()
    together = threading.Barrier(3, timeout=20)

    def square(x: int) -> int:
        seen.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        if x < 3:
            together.wait()  # passes only if three are at work at once
        return x * x

    told: list[int] = []
    assert side_by_side(square, range(7), width=8, done=told.append) == [x * x for x in range(7)]
    assert len(seen) == 3 and told == [1, 2, 3, 4, 5, 6, 7]
    assert torch.get_num_threads() == 3


def test_wide_sites_are_fitted_one_after_the_other(three_threads: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY", 16 * 8 * 100**2)
    seen: set[int] = set()
    side_by_side(lambda _: seen.add(threading.get_ident()), range(4), width=100)
    assert seen == {threading.get_ident()}
    assert torch.get_num_threads() == 3


def test_an_error_comes_out_and_threads_are_as_before(three_threads: object) -> None:
    def fails(x: int) -> None:
        raise ValueError(f"site {x}")

    with pytest.raises(ValueError, match="site 0"):
        side_by_side(fails, range(3), width=8)
    assert torch.get_num_threads() == 3


def test_a_cpu_solves_one_block_at_a_time(request: pytest.FixtureRequest) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices, wanted = torch.randn(3, 8, 8, generator=generator), torch.randn(3, 8, 2, generator=generator)
    expected = torch.linalg.solve(matrices, wanted)
    request.getfixturevalue("no_batches")
    assert torch.allclose(solved(matrices, wanted), expected)


@pytest.mark.parametrize(
    ("room", "place"), [(None, "cuda"), (2 << 30, "cuda"), (1 << 30, "cpu")], ids=["free", "enough", "too little"]
)
def test_a_gpu_fits_sites_in_what_it_may_take(monkeypatch: pytest.MonkeyPatch, room: int | None, place: str) -> None:
    """128 matrices of 1024 x 1024 numbers are 1 GiB, and the weights that stay take a quarter more."""
    for name, found in (("mem_get_info", (70 << 30, 80 << 30)), ("memory_reserved", 0), ("memory_allocated", 1 << 29)):
        monkeypatch.setattr(torch.cuda, name, lambda _, found=found: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fitting_device("cuda", 1024, room) == place
    assert fitting_device("cpu", 1024, room) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_where_no_gpu_is_sites_are_fitted_without_one() -> None:
    """A process may lead tasks of a cluster, which have the GPUs that are meant."""
    assert fitting_device("cuda", 8, 8 << 30) == "cpu"
