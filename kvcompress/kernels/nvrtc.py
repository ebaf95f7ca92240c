"""CUDA kernels from source, through the NVRTC that torch brings along (since 2.9), and kept on disk once compiled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.writer import atomic_file
from kvcompress.errors import OutputError

#: Kernels that are compiled at once: each takes some hundred megabytes meanwhile.
_MOST_THREADS = 16


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
    file_name = _file_name(source, device)
    with suppress(OSError, RuntimeError):
        return _load((_directory() / file_name).read_bytes(), device)
    binary = _binary(source, name, device)
    _keep(binary, file_name)
    return _load(binary, device)


def compile_ahead(sources: Mapping[str, str], device: torch.device, *, rank: int = 0, n_ranks: int = 1) -> int:
    """Compile on several processors what is not on disk yet, where `compiled` finds it; return how many that were.

    sources: the name that `compiled` takes, by the source. rank, n_ranks: of processes that need mostly the same; each
    begins with other ones, and finds what the others have made meanwhile. Where no disk keeps them, nothing is done.
    """
    try:
        directory = _directory()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return 0
    missing = [(_file_name(source, device), source, name) for source, name in sources.items()]
    missing = [item for item in missing if not (directory / item[0]).exists()]
    if not missing or not os.access(directory, os.W_OK):
        return 0
    missing.sort(key=lambda item: (int(item[0][:8], 16) - rank) % n_ranks)

    def make(item: tuple[str, str, str]) -> bool:
        file_name, source, name = item
        if (directory / file_name).exists():
            return False
        _keep(_binary(source, name, device), file_name)
        return True

    processors = max(1, (os.cpu_count() or 1) // n_ranks)
    with ThreadPoolExecutor(min(len(missing), processors, _MOST_THREADS)) as pool:
        return sum(pool.map(make, missing))


def _keep(binary: bytes, file_name: str) -> None:
    """Write a binary to disk, if that can be: there may be no home, or one that is read-only, or a full disk."""
    with suppress(OSError, RuntimeError, OutputError), atomic_file(_directory() / file_name) as scratch:
        scratch.write_bytes(binary)


def _file_name(source: str, device: torch.device) -> str:
    made_for = (source, torch.cuda.get_device_capability(device), torch.version.cuda, torch.__version__)
    return f"{hashlib.sha256(repr(made_for).encode()).hexdigest()}.cubin"


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
