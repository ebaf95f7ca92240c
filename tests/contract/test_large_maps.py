"""Fits and maps of more sites than memory holds: one at a time, and the same output to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress import pipeline
from kvcompress.checkpoint.maps import MAPS_FILE, SiteMaps, save_maps
from kvcompress.checkpoint.spilled import SpilledMaps
from kvcompress.choose import fits
from kvcompress.errors import Note
from kvcompress.model.model_spec import Site
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress
from kvcompress.plan import PLAN_FILE, Plan


@pytest.mark.parametrize("options", [{}, {"ranks_only": True, "keep": 0.5}, {"key_basis": "band", "band": 4}])
def test_the_output_is_the_same(
    tiny_checkpoint: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    chosen = CompressOptions(calibration=(str(text_file),), tokens=256, seq_len=32, recent=4, **options)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "held", chosen, device="cpu")
    spilled, fitted = list[SpilledMaps](), list[object]()
    own, fit = SpilledMaps.__init__, fits.fit_site
    monkeypatch.setattr(SpilledMaps, "__init__", lambda self, d: (spilled.append(self), own(self, d))[1])
    monkeypatch.setattr(fits, "fit_site", lambda *a, **kw: (fitted.append(a), fit(*a, **kw))[1])
    monkeypatch.setattr(fits, "_HELD_SHARE", 0.0)
    compress(tiny_checkpoint("llama-gqa"), tmp_path / "lean", chosen, device="cpu")
    assert len(spilled) == 1 and len(fitted) == 2 * 6  # every site once for its curve, once for its maps
    for name in (MAPS_FILE, PLAN_FILE, "report.json"):
        assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "lean" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))


def test_maps_that_are_put_back_are_not_written_over_their_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors before 0.8 writes in place: what was read of a file, memory-mapped, would change with it."""

    def in_place(maps: Mapping[Site, SiteMaps], file: Path) -> None:
        assert not file.exists()
        save_maps(maps, file)

    monkeypatch.setattr("kvcompress.checkpoint.spilled.save_maps", in_place)
    blocks, block, bits = torch.arange(2).int()[None], torch.zeros(2).int(), torch.full((2,), 4, dtype=torch.uint8)
    maps, site = SpilledMaps(tmp_path), Site(0, "value")
    maps[site] = SiteMaps(blocks, torch.rand(2, 2), torch.rand(2, 2), block, bits, torch.rand(2), None)
    read = maps[site]
    maps[site] = replace(read, decoder=read.decoder + 1)
    assert torch.equal(maps[site].decoder, read.decoder + 1) and torch.equal(maps[site].encoder, read.encoder)
    assert len(maps) == 1 and len(list(tmp_path.iterdir())) == 1


class TestMapsOnly:
    """Weights of large models are not copied, unless that is asked for."""

    @pytest.fixture
    def written(self, tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def write(**options: Any) -> set[str]:
            monkeypatch.setattr(pipeline, "_MOST_COPIED", 1000)
            compress(tiny_checkpoint("llama-gqa"), tmp_path / "out", CompressOptions(metric="weights", **options))
            return {file.name for file in (tmp_path / "out").iterdir()}

        return write

    def test_by_size(self, written: Any, tmp_path: Path) -> None:
        with pytest.warns(Note, match=r"0 GB of weights are not copied.*--no-maps-only"):
            files = written()
        assert MAPS_FILE in files and "model.safetensors" not in files
        assert Plan.load(tmp_path / "out").options["maps_only"] is True

    def test_as_asked(self, written: Any, tmp_path: Path) -> None:
        assert {MAPS_FILE, "model.safetensors"} <= written(maps_only=False)
        assert Plan.load(tmp_path / "out").options["maps_only"] is False

    def test_folds_have_weights_of_their_own(self, written: Any) -> None:
        assert "model.safetensors" in written(folded=True, key_basis="frequency", keep=0.5)
