"""CUDA kernels from source, through the NVRTC that torch brings along (since 2.9), and kept on disk once compiled."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.writer import atomic_file
from kvcompress.errors import OutputError


@lru_cache(maxsize=64)
def compiler_works(device: torch.device) -> bool:
    """Return whether this is a GPU that has what the kernels need, and this torch an NVRTC that compiles for it."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _load(_binary('extern "C" __global__ void nothing() {}', "nothing", device), device)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return False
    return True


def compiled(source: str, name: str, device: torch.device) -> Any:
    """Return a module of the kernels of a source, `name` among them.

    Compiled once for a GPU's architecture and version of CUDA: the binary is kept in $XDG_CACHE_HOME/kvcompress/kernels
    (~/.cache if that is not set), and is only compiled again where it cannot be read or loaded.
    """
    made_for = (source, torch.cuda.get_device_capability(device), torch.version.cuda, torch.__version__)
    file_name = f"{hashlib.sha256(repr(made_for).encode()).hexdigest()}.cubin"
    with suppress(OSError, RuntimeError):
        return _load((_directory() / file_name).read_bytes(), device)
    binary = _binary(source, name, device)
    # There may be no home, or one that is read-only, or a full disk.
    with suppress(OSError, RuntimeError, OutputError), atomic_file(_directory() / file_name) as scratch:
        scratch.write_bytes(binary)
    return _load(binary, device)


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcompress" / "kernels"


def _binary(source: str, name: str, device: torch.device) -> bytes:
    from torch.cuda import _utils

    with torch.cuda.device(device):
        return _utils._nvrtc_compile(source, name)[0]


def _load(binary: bytes, device: torch.device) -> Any:
    from torch.cuda import _utils

    with torch.cuda.device(device):
        return _utils._cuda_load_module(binary)
