"""Kernels that may begin while the launch before them ends: programmatic dependent launches, which torch lacks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int, int]
#: Of the driver: the first whose CUDA graphs record such launches as what they are.
_OLDEST_DRIVER = 12030
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h. value: a union of 64 bytes, aligned to 8."""

    _fields_ = (("id", ctypes.c_uint), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_memory", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True)
class OverlappingKernel:
    """A kernel that may begin while the launch before it ends, called as torch's kernels are.

    It must wait (griddepcontrol.wait) before it reads or overwrites what that launch writes or reads. function: a
    CUfunction. driver: has cuLaunchKernelEx. check: raises if a result of the driver's is not 0.
    """

    function: ctypes.c_void_p
    driver: Any
    check: Callable[[int], None]

    def __call__(self, grid: Size, block: Size, args: Sequence[Tensor | int | float], shared_mem: int = 0) -> None:
        values = [_converted(value) for value in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,))
        stream = torch.cuda.current_stream().cuda_stream
        config = _Config(grid, block, shared_mem, stream, ctypes.pointer(attribute), 1)
        self.check(self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None))


def overlapping(kernel: Any, device: torch.device) -> Any:
    """Return a kernel of torch's as OverlappingKernel, or as it is where the GPU or its driver lacks such launches."""
    from torch.cuda import _utils

    driver, version = _utils._get_gpu_runtime_library(), ctypes.c_int()
    _utils._check_cuda(driver.cuDriverGetVersion(ctypes.byref(version)))
    if torch.cuda.get_device_capability(device) < (9, 0) or version.value < _OLDEST_DRIVER:
        return kernel
    return OverlappingKernel(kernel.func, driver, _utils._check_cuda)


def _converted(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int(value)
