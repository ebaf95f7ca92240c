"""Sites fitted by threads: on a GPU only the few threads that it takes handles for meet it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvcompress.checkpoint.reader import open_checkpoint
from kvcompress.choose import fits as module
from kvcompress.choose.fits import Fits
from kvcompress.choose.fitting import FittedSite, with_true_energy
from kvcompress.options import CompressOptions


def test_a_gpu_is_met_by_its_own_threads_alone(
    tiny_checkpoint: Any, tiny_moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are those of `device`, and so is the place where they are made."""
    placed, met = ["cpu"], []

    def side_by_side(function: Callable[[Any], Any], items: Sequence[Any], *, device: str = "cpu", **_: Any) -> Any:
        placed.append(device)
        found = [function(item) for item in items]
        placed.pop()
        return found

    def weighed(site: FittedSite, options: CompressOptions, *, device: str) -> FittedSite:
        met.append((placed[-1], device))
        return with_true_energy(site, options)

    options = CompressOptions(key_basis="frequency")
    with open_checkpoint(tiny_checkpoint("llama-gqa")) as checkpoint:
        moments = tiny_moments("llama-gqa")
        ours = Fits(checkpoint, moments, options).held()
        monkeypatch.setattr(module, "side_by_side", side_by_side)
        monkeypatch.setattr(module, "with_true_energy", weighed)
        elsewhere = Fits(checkpoint, moments, options, device="cuda:0").held()
    assert met == [("cuda:0", "cuda:0")] * len(ours)
    assert list(elsewhere) == list(ours)
    for site, fit in ours.items():
        assert torch.equal(elsewhere[site].energy, fit.energy)
