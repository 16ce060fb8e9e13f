"""IF nodes inside a CUDA graph that is being captured: a piece of a step that runs only where a flag is set.

torch 2.11 has no way to make them, so they are made through cuda-bindings: a kernel of one thread hands the flag to
the graph, and the piece is captured into the node's own graph on another stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_SOURCE = b"""
typedef unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
extern "C" __global__ void set_condition(cudaGraphConditionalHandle handle, const int* flag) {
    cudaGraphSetConditional(handle, *flag != 0);
}
"""


class ConditionalNodes:
    """Branches of steps that a graph captures; outside of a capture a piece always runs.

    Memory that a piece asks for comes from a pool of its own, because torch knows the other stream as none that
    captures for its graph. Pieces run one behind the other, so they may share it.
    Raises ValueError without the package cuda-bindings.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        check_bindings()
        torch.cuda.current_stream().synchronize()  # the driver needs torch's context
        self._kernel = _kernel(torch.cuda.get_device_capability())
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.MemPool()
        # Products want a workspace for each stream, which is not to be found first within a capture.
        with torch.cuda.stream(self._stream):
            square = torch.ones(16, 16, dtype=dtype, device="cuda")
            torch.mm(square, square)
        self._stream.synchronize()

    def when(self, flag: Tensor, piece: Callable[[], None]) -> None:
        """piece() if `flag`, of one element, is not zero."""
        if not torch.cuda.is_current_stream_capturing():
            piece()
            return
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

        body, words = self._node(flag.to(torch.int32)), runtime.cudaStreamCaptureMode
        stream = self._stream.cuda_stream
        _checked(
            runtime.cudaStreamBeginCaptureToGraph(
                stream, body, None, None, 0, words.cudaStreamCaptureModeThreadLocal
            )
        )
        try:
            with torch.cuda.use_mem_pool(self._pool), torch.cuda.stream(self._stream):
                piece()
        finally:
            ended = runtime.cudaStreamEndCapture(stream)
        _checked(ended)

    def _node(self, flag: Tensor) -> Any:
        """The empty graph of a new IF node, which is the next piece of work of the capturing stream."""
        from cuda.bindings import driver, runtime  # pyright: ignore[reportMissingImports]

        stream = torch.cuda.current_stream().cuda_stream
        graph = _capture(stream)[2]
        handle = _checked(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0))
        number, pointer = ctypes.c_ulonglong(int(handle)), ctypes.c_void_p(flag.data_ptr())
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(number), ctypes.addressof(pointer))
        _checked(
            driver.cuLaunchKernel(
                self._kernel, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.addressof(arguments), 0
            )
        )
        _, _, graph, before, edges, count = _capture(stream)[:6]
        wanted = runtime.cudaGraphNodeParams()
        wanted.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        wanted.conditional.handle = handle
        wanted.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        wanted.conditional.size = 1
        if hasattr(wanted.conditional, "ctx"):  # of CUDA 13
            context = _checked(driver.cuCtxGetCurrent())
            wanted.conditional.ctx = runtime.cudaExecutionContext_t(int(context))
        node = _checked(runtime.cudaGraphAddNode(graph, before, edges, count, wanted))
        instead = runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        _checked(runtime.cudaStreamUpdateCaptureDependencies(stream, [node], None, 1, instead))
        return wanted.conditional.phGraph_out[0]


def check_bindings() -> None:
    """Raise ValueError, in one sentence, where no IF node can be made."""
    try:
        import cuda.bindings  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "fbs.graphs is 'branches', which needs the package cuda-bindings; install it, or take 'full', where "
            "every layer is read"
        ) from None


def _capture(stream: int) -> tuple[Any, ...]:
    """(status, id, graph, nodes that come before, their edges, how many)."""
    from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

    return _checked(runtime.cudaStreamGetCaptureInfo(stream))


@lru_cache(maxsize=4)
def _kernel(capability: tuple[int, int]) -> Any:
    from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]

    program = _checked(nvrtc.nvrtcCreateProgram(_SOURCE, b"set_condition.cu", 0, [], []))
    options = [f"--gpu-architecture=compute_{capability[0]}{capability[1]}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(
            f"the kernel of IF nodes does not compile: {log.decode(errors='replace')}"
        )
    text = b" " * _checked(nvrtc.nvrtcGetPTXSize(program))
    _checked(nvrtc.nvrtcGetPTX(program, text))
    module = _checked(driver.cuModuleLoadData(text))
    return _checked(driver.cuModuleGetFunction(module, b"set_condition"))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value in a driver's answer; RuntimeError if it says that something went wrong."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA: {answer[0]}")
    return answer[1] if len(answer) == 2 else answer[1:]
