"""Compiled kernels on disk, with a compiler and a GPU that are stand-ins."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from kvcompress.kernels import nvrtc

GPU = torch.device("cuda", 0)


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: Any) -> list[str]:
    """The sources that were compiled so far; what is loaded comes back as it is, unless it is broken."""
    sources: list[str] = []

    def binary(source: str, name: str, device: torch.device) -> bytes:
        sources.append(source)
        return f"{name} of {source}".encode()

    def load(binary: bytes, device: torch.device) -> bytes:
        if b" of " not in binary:
            raise RuntimeError("CUDA error: device kernel image is invalid")
        return binary

    monkeypatch.setattr(nvrtc, "_binary", binary)
    monkeypatch.setattr(nvrtc, "_load", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return sources


def test_a_kernel_is_compiled_once(compilations: list[str], monkeypatch: Any) -> None:
    for _ in range(2):
        assert nvrtc.compiled("a", "k", GPU) == b"k of a"
    assert nvrtc.compiled("b", "k", GPU) == b"k of b"
    assert compilations == ["a", "b"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    nvrtc.compiled("a", "k", GPU)
    assert compilations == ["a", "b", "a"]


def test_a_broken_file_is_replaced(compilations: list[str], tmp_path: Path) -> None:
    nvrtc.compiled("a", "k", GPU)
    (file,) = (tmp_path / "kvcompress" / "kernels").iterdir()
    file.write_bytes(b"half")
    assert nvrtc.compiled("a", "k", GPU) == b"k of a" == file.read_bytes()
    assert compilations == ["a", "a"]


def test_nothing_needs_to_be_writable(compilations: list[str], tmp_path: Path) -> None:
    (tmp_path / "kvcompress").write_text("where the directory would be")
    assert nvrtc.compiled("a", "k", GPU) == b"k of a"
    assert compilations == ["a"]


def test_nobody_needs_a_home(compilations: list[str], monkeypatch: Any) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert nvrtc.compiled("a", "k", GPU) == b"k of a"


def test_kernels_compile_at_the_same_time_before_they_are_used(compilations: list[str], monkeypatch: Any) -> None:
    together, make = Barrier(3, timeout=20), nvrtc._binary

    def waiting(source: str, name: str, device: torch.device) -> bytes:
        together.wait()  # until three threads are here
        return make(source, name, device)

    monkeypatch.setattr(nvrtc, "_binary", waiting)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert nvrtc.compile_ahead({"a": "k", "b": "k", "c": "k"}, GPU, rank=1, n_ranks=2) == 3
    assert sorted(compilations) == ["a", "b", "c"]
    assert nvrtc.compile_ahead({"b": "k", "a": "k"}, GPU) == 0
    assert nvrtc.compiled("b", "k", GPU) == b"k of b" and len(compilations) == 3


def test_ranks_begin_with_different_kernels_and_find_what_the_others_made(
    compilations: list[str], monkeypatch: Any
) -> None:
    sources, order = {f"source {i}": "k" for i in range(40)}, list[list[str]]()
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(nvrtc, "_keep", lambda binary, file_name: None)
    for rank in range(2):
        compilations.clear()
        nvrtc.compile_ahead(sources, GPU, rank=rank, n_ranks=2)
        order.append(list(compilations))
    assert sorted(order[0]) == sorted(order[1]) == sorted(sources)
    assert not set(order[0][:10]) & set(order[1][:10])


def test_nothing_is_compiled_ahead_where_no_disk_keeps_it(compilations: list[str], tmp_path: Path) -> None:
    (tmp_path / "kvcompress").write_text("where the directory would be")
    assert nvrtc.compile_ahead({"a": "k"}, GPU) == 0 and not compilations


def test_without_a_gpu_nothing_compiles() -> None:
    assert not nvrtc.compiler_works(torch.device("cpu"))
