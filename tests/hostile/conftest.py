"""What the tests of bad input share: copies that may be damaged, and what a refusal must leave behind: nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.errors import KVCompressError
from kvcompress.options import CompressOptions
from kvcompress.pipeline import compress


def listing(directory: Path) -> dict[str, str]:
    """Return {path: SHA-256 of the file} of everything below a directory."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "directory"
        for p in sorted(directory.rglob("*"))
    }


@pytest.fixture
def source(tiny_checkpoint: Any, tmp_path: Path) -> Callable[[str], Path]:
    """source(family): a copy of a tiny checkpoint that may be damaged."""

    def copy(family: str) -> Path:
        shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
        return tmp_path / "model"

    return copy


@pytest.fixture
def refused(tmp_path: Path, text_file: Path) -> Callable[..., str]:
    """refused(error class, source, **options): the message of a refusal that left no trace."""

    def check(expected: type[KVCompressError], model: Any, output: Path | None = None, **options: Any) -> str:
        before = listing(tmp_path)
        with pytest.raises(KVCompressError) as error:
            values = {"keep": 0.5, "calibration": (str(text_file),), "tokens": 128, "seq_len": 32} | options
            compress(model, output or tmp_path / "out", CompressOptions(**values), device="cpu")
        assert error.type is expected
        assert "\n" not in str(error.value)
        assert listing(tmp_path) == before
        return str(error.value)

    return check
