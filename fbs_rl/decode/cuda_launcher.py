"""Compiles the kernels on the machine (NVRTC) and launches programs: one block on each multiprocessor, all at once."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, Protocol

import torch

from fbs_rl.decode.kernel_source import KernelShape, kernel_text
from fbs_rl.decode.program import MOST_SHARED_BYTES, THREADS, Program


class Launcher(Protocol):
    """Where programs run. multiprocessors: blocks that run side by side, one on each."""

    device: torch.device
    multiprocessors: int

    def run(self, program: Program, first: int, end: int) -> None:
        """Put the program's calls [first, end) behind what was launched before."""
        ...


class CudaLauncher:
    """Launches on torch's current stream. Raises ValueError where there is no CUDA device that can run the kernels."""

    def __init__(self, shape: KernelShape) -> None:
        check_cuda()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        torch.cuda.current_stream().synchronize()  # the driver needs torch's context
        self._function = _load(shape, torch.cuda.get_device_capability(self.device))

    def run(self, program: Program, first: int, end: int) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.multiprocessors, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
        config.sharedMemBytes = program.shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        # Blocks wait for each other, so all must be there at once.
        together = driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        config.attrs, config.numAttrs = [together], 1
        arguments = program.part(first, end)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))


def check_cuda() -> None:
    """Raise ValueError, in one sentence, where the graph decoder cannot run."""
    if not torch.cuda.is_available():
        raise ValueError(
            "the graph decoder needs a CUDA device and there is none; "
            "decode with fbs_rl.decoding, which runs anywhere"
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise ValueError(
            f"the graph decoder needs compute capability 9.0 or newer, this device has {major}.{minor}; "
            f"decode with fbs_rl.decoding"
        )
    try:
        import cuda.bindings  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "the graph decoder needs the package cuda-bindings: pip install cuda-bindings"
        ) from None


@lru_cache(maxsize=8)
def _load(shape: KernelShape, capability: tuple[int, int]) -> Any:
    from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]

    program = _checked(
        nvrtc.nvrtcCreateProgram(kernel_text().encode(), b"fbs_kernels.cu", 0, [], [])
    )
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}a", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in shape.definitions().items()]
    words = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the kernels do not compile: {log.decode(errors='replace')}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    function = _checked(
        driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(binary)), b"run")
    )
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, MOST_SHARED_BYTES))
    return function


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value in a driver's answer; RuntimeError if it says that something went wrong."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0]}")
    return answer[1] if len(answer) == 2 else answer[1:]
