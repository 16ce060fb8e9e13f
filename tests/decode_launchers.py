"""Where the tests run the decoder's kernels: on a CPU through the emulator, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from fbs_rl.decode.cuda_launcher import CudaLauncher, Launcher
from fbs_rl.decode.kernel_source import KernelShape
from tests.cuda_emulator import COMPILER, EmulatedLauncher

PLACES = [
    pytest.param("emulated", marks=pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def make_launcher(place: str, shape: KernelShape) -> Launcher:
    return EmulatedLauncher(shape) if place == "emulated" else CudaLauncher(shape)
