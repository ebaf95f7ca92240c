"""Sites fitted by threads: on a GPU only the few threads that it takes handles for meet it; and by workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kvcompress.calibration.memory import allocatable
from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.choose import fits as module
from kvcompress.choose.fits import Fits
from kvcompress.choose.fitting import FittedSite, with_true_energy
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Where energies are made true, and on which device: one that is not there."""
    placed, met = ["cpu"], []

    def side_by_side(function: Callable[[Any], Any], items: Sequence[Any], *, device: str = "cpu", **_: Any) -> Any:
        placed.append(device)
        found = [function(item) for item in items]
        placed.pop()
        return found

    def weighed(site: FittedSite, options: CompressOptions, *, device: str) -> FittedSite:
        met.append((placed[-1], device))
        return with_true_energy(site, options)

    monkeypatch.setattr(module, "side_by_side", side_by_side)
    monkeypatch.setattr(module, "with_true_energy", weighed)
    return met


def fits(tiny_checkpoint: Any, tiny_moments: Any, device: str = "cpu", **by: Any) -> dict[Site, FittedSite]:
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        made = Fits(checkpoint, tiny_moments("llama-gqa"), CompressOptions(key_basis="frequency"), device=device)
        return made.held(**by)


@pytest.fixture
def ours(tiny_checkpoint: Any, tiny_moments: Any) -> dict[Site, FittedSite]:
    return fits(tiny_checkpoint, tiny_moments)


def test_a_gpu_is_met_by_its_own_threads_alone(
    tiny_checkpoint: Any, tiny_moments: Any, ours: dict[Site, FittedSite], met: list[tuple[str, str]]
) -> None:
    """The products are those of `device`, and so is the place where they are made."""
    elsewhere = fits(tiny_checkpoint, tiny_moments, "cuda:0")
    assert met == [("cuda:0", "cuda:0")] * len(ours)
    assert list(elsewhere) == list(ours)
    for site, fit in ours.items():
        assert torch.equal(elsewhere[site].energy, fit.energy)


class Elsewhere:
    """Workers whose devices are GPUs, and who are sent everything."""

    n = 2

    def each(self, function: Any, items: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for index, item in reversed(list(enumerate(items))):
            given, *how = pickle.loads(pickle.dumps(item))
            assert all(not len(moments.samples) and moments.typical is None for _, moments, *_ in given)
            yield index, function(given, *how, f"cuda:{index % 2}")


@pytest.mark.parametrize(("memory", "room"), [(None, None), (8 << 30, allocatable(8 << 30, solves=True))])
def test_workers_fit_where_one_process_does(
    memory: int | None,
    room: int | None,
    tiny_checkpoint: Any,
    tiny_moments: Any,
    ours: dict[Site, FittedSite],
    met: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the GPU of each if it has the room, within its memory; what comes is to the bit the same."""
    asked, held = [], []

    def fitting_device(device: str, width: int, room: int | None) -> str:
        asked.append((device, width, room))
        return device

    def limited(*what: Any, solves: bool) -> Any:
        held.append(what)
        return nullcontext()

    monkeypatch.setattr(module, "fitting_device", fitting_device)
    monkeypatch.setattr(module, "limited", limited)
    shared = fits(tiny_checkpoint, tiny_moments, workers=Elsewhere(), memory=memory)
    widest = max(fit.blocks.numel() for fit in ours.values())
    assert len(ours) == 6
    assert {place for place, _, _ in asked} == {"cuda:0", "cuda:1"}
    assert all(what == [widest, room] for _, *what in asked)
    assert held == [(place, memory) for place, _, _ in asked]
    assert len(met) == len(ours) and all(place == device and place != "cpu" for place, device in met)
    for site, fit in ours.items():
        assert torch.equal(shared[site].energy, fit.energy)
        assert torch.equal(shared[site].covariance, fit.covariance)
