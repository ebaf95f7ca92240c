"""What the driver is given where a kernel may begin while the launch before it ends, byte by byte as in cuda.h."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompress.kernels.launch import OverlappingKernel, overlapping


class Driver:
    """Keeps what it is asked to launch, while the arguments are alive."""

    version, result = 12030, 0

    def cuLaunchKernelEx(self, config: Any, function: ctypes.c_void_p, arguments: Any, extra: None) -> int:
        # CUlaunchConfig: three numbers of blocks, three of threads, bytes shared, stream, attributes, how many
        *self.sizes, self.stream, attributes, n_attributes = struct.unpack(
            "@7I4xQQI4x", ctypes.string_at(ctypes.addressof(config._obj), 56)
        )
        assert n_attributes == 1 and attributes % 8 == 0
        # CUlaunchAttribute: id, and at 8 a union of 64 bytes
        self.attribute = struct.unpack("@I4x16I", ctypes.string_at(attributes, 72))
        self.function = function.value
        self.arguments = [ctypes.string_at(at, 8) for at in arguments[:2]] + [ctypes.string_at(arguments[2], 4)]
        return self.result

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0


def check(result: int) -> None:
    if result:
        raise RuntimeError(f"CUDA error {result}")


@pytest.fixture(autouse=True)
def stream(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0xABCDEF012345))


def test_the_driver_gets_sizes_stream_attribute_and_arguments() -> None:
    driver, tensor = Driver(), torch.zeros(3)
    OverlappingKernel(ctypes.c_void_p(77), driver, check)((4, 5, 6), (256, 2, 1), [tensor, 2.5, -3], 98304)
    assert driver.sizes == [4, 5, 6, 256, 2, 1, 98304]
    assert driver.stream == 0xABCDEF012345 and driver.function == 77
    assert driver.attribute == (6, 1, *[0] * 15)
    assert driver.arguments == [struct.pack("@Q", tensor.data_ptr()), struct.pack("@d", 2.5), struct.pack("@i", -3)]


def test_an_error_of_the_driver_is_raised() -> None:
    driver = Driver()
    driver.result = 719
    with pytest.raises(RuntimeError, match="719"):
        OverlappingKernel(ctypes.c_void_p(77), driver, check)((1, 1, 1), (32, 1, 1), [0, 0, 0])


@pytest.mark.skipif(not hasattr(torch.cuda._utils, "_get_gpu_runtime_library"), reason="needs torch 2.9")
@pytest.mark.parametrize(
    ("capability", "version", "overlaps"),
    [((9, 0), 12030, True), ((12, 0), 13000, True), ((8, 9), 13000, False), ((9, 0), 12020, False)],
)
def test_old_gpus_and_drivers_launch_as_torch_does(
    capability: tuple[int, int], version: int, overlaps: bool, monkeypatch: Any
) -> None:
    driver = Driver()
    driver.version = version
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel = SimpleNamespace(func=ctypes.c_void_p(77))
    made = overlapping(kernel, torch.device("cuda", 0))
    assert isinstance(made, OverlappingKernel) if overlaps else made is kernel
