"""A folded compression of a tiny model, for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress


@pytest.fixture
def folded_output(tiny_checkpoint: Any, tmp_path: Path, text_file: Path) -> Any:
    """folded_output(family, options, **config fields): the directory of a folded compression."""

    def make(family: str, options: dict[str, Any], **changes: Any) -> Path:
        small = {"calibration": (str(text_file),), "tokens": 512, "seq_len": 64, "recent": 0, "sinks": 0}
        whole = CompressOptions(**({"keep": 0.5, "policy": "uniform", "folded": True} | small | options))
        compress(tiny_checkpoint(family, **changes), tmp_path / "folded", whole, device="cpu")
        return tmp_path / "folded"

    return make
