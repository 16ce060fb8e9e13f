"""Compiles the kernels on the machine (NVRTC) and launches them, each allowed to start while the one before ends."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, Protocol

import torch

from fbs_rl.decode.kernel_arguments import Launch
from fbs_rl.decode.kernel_source import KernelShape, kernel_text

_PLAIN_SHARED_BYTES = 40 * 1024  # more, with what a kernel has of its own, has to be asked for
_SHARED_PERCENT = 100  # of the memory that a multiprocessor cuts into shared memory and cache
MOST_SHARED_BYTES = 227 * 1024  # of one block on compute capability 9.0


class Launcher(Protocol):
    """Where kernels run. multiprocessors: blocks that run side by side, one on each."""

    device: torch.device
    multiprocessors: int

    def launch(self, call: Launch) -> None:
        """Put the call behind those before it."""
        ...


class CudaLauncher:
    """Launches on torch's current stream. Raises ValueError where there is no CUDA device that can run the kernels."""

    def __init__(self, shape: KernelShape) -> None:
        check_cuda()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        torch.cuda.current_stream().synchronize()  # the driver needs torch's context
        self._library = _load(shape, torch.cuda.get_device_capability(self.device))
        self._functions: dict[str, Any] = {}
        self._allowed_bytes: dict[str, int] = {}

    def launch(self, call: Launch) -> None:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = call.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = call.threads, 1, 1
        config.sharedMemBytes = call.shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(call.arguments))
        function = self._function(call.kernel, call.shared_bytes)
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))

    def _function(self, name: str, shared_bytes: int) -> Any:
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        attributes = driver.CUfunction_attribute
        if name not in self._functions:
            function = _checked(driver.cuModuleGetFunction(self._library, name.encode()))
            # Kernels that cut a multiprocessor's memory alike can run on it together, one into the next.
            share = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(function, share, _SHARED_PERCENT))
            self._functions[name] = function
        function = self._functions[name]
        if shared_bytes > self._allowed_bytes.get(name, _PLAIN_SHARED_BYTES):
            limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
            self._allowed_bytes[name] = shared_bytes
        return function


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
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in shape.definitions().items()]
    words = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"the kernels do not compile: {log.decode(errors='replace')}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return _checked(driver.cuModuleLoadData(binary))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value in a driver's answer; RuntimeError if it says that something went wrong."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0]}")
    return answer[1] if len(answer) == 2 else answer[1:]
