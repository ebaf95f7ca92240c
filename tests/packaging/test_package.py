"""What users' tools find in the installed packages."""

from __future__ import annotations

from importlib.resources import files

import pytest


@pytest.mark.parametrize("package", ["kvcompress", "kvcompress_cli"])
def test_type_checkers_may_read_the_annotations(package: str) -> None:
    assert (files(package) / "py.typed").is_file()
