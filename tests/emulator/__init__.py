"""The CUDA kernels for turns on a CPU: compiled as C++ against emulator.h, with launches that look like torch's."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from torch import Tensor

from kvcompress.kernels.turned import kernel_source

_HERE = Path(__file__).parent
#: Without -march=native every half number is converted by a function; a fortified longjmp refuses to change stacks.
_COMMAND = ["g++", "-x", "c++", "-std=c++20", "-O1", "-w", "-march=native", "-U_FORTIFY_SOURCE"]


@lru_cache(maxsize=1)
def available() -> bool:
    """Return whether there is a compiler that knows half precision (g++ from 12 on, on x86 and Arm)."""
    if shutil.which(_COMMAND[0]) is None:
        return False
    trial = subprocess.run(
        [*_COMMAND, "-fsyntax-only", "-"], input="#include <ucontext.h>\n_Float16 x;", text=True, capture_output=True
    )
    return trial.returncode == 0


@lru_cache(maxsize=256)
def kernels(constants: tuple[tuple[str, int], ...], names: tuple[str, ...], *_: Any) -> list[Callable[..., None]]:
    """Stands in for kernels.turned._kernels."""
    source = f'#include "{_HERE / "emulator.h"}"\n' + kernel_source(constants, names)
    for i, name in enumerate(names):
        source += (
            f'extern "C" void run_{name}(const int* grid, int n_threads, int n_shared, void** arguments, '
            f"const size_t* sizes) {{ emulator::launch({name}, {int(i > 0)}, grid, n_threads, n_shared, "
            "arguments, sizes); }\n"
        )
    library = ctypes.CDLL(str(_built(source)))
    return [_launcher(getattr(library, f"run_{name}")) for name in names]


def _built(source: str) -> Path:
    whole = " ".join(_COMMAND) + source + (_HERE / "emulator.h").read_text()
    digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    library = Path(gettempdir()) / f"kvcompress-emulator-{digest}.so"
    if not library.exists():
        scratch = library.with_suffix(f".{id(source)}.so")
        subprocess.run([*_COMMAND, "-shared", "-fPIC", "-o", str(scratch), "-"], input=source, text=True, check=True)
        scratch.rename(library)
    return library


def _launcher(run: Any) -> Callable[..., None]:
    def launch(grid: tuple[int, ...], block: tuple[int, ...], args: list[Any], shared_mem: int = 0) -> None:
        values: list[Any] = []
        for value in args:
            if isinstance(value, Tensor):
                values.append(ctypes.c_void_p(value.data_ptr()))
            else:
                values.append(ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = (ctypes.c_size_t * len(values))(*(_storage_after(v) if isinstance(v, Tensor) else 0 for v in args))
        run((ctypes.c_int * 3)(*grid), block[0], shared_mem, pointers, sizes)

    return launch


def _storage_after(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of what it covers."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
