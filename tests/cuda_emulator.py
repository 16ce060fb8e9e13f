"""Runs the decoder's CUDA source on a CPU: compiled by the system's C++ compiler, one fiber a CUDA thread."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from fbs_rl.decode.kernel_source import KernelShape, kernel_text
from fbs_rl.decode.program import Program

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("cuda_emulator.h")


class EmulationError(RuntimeError):
    """A program that would hang, or overwrite what is not its own."""


class EmulatedLauncher:
    """Stands in for a CUDA device: programs run at once."""

    device = torch.device("cpu")
    multiprocessors = 3

    def __init__(self, shape: KernelShape) -> None:
        self.library = ctypes.CDLL(str(_build(shape)))

    def run(self, program: Program, first: int, end: int) -> None:
        emulate = self.library.emulate
        emulate.restype = ctypes.c_bool
        done = emulate(
            ctypes.byref(program.part(first, end)), self.multiprocessors, program.shared_bytes
        )
        if not done:
            raise EmulationError("threads wait for each other, or write behind their shared memory")


def _build(shape: KernelShape) -> Path:
    text = kernel_text()
    entry = (
        "static const Program* program;\n"
        'extern "C" bool emulate(const Program* p, unsigned blocks, unsigned bytes) {\n  program = p;\n'
        "  const auto kernel = [](unsigned char* shared) { walk(*program, shared); };\n"
        "  return run_grid(kernel, blocks, ALL_THREADS, THREADS, bytes);\n}"
    )
    flags = [f"-D{name}={value}" for name, value in shape.definitions().items()]
    source = f'#define EMULATED\n#include "{_HEADER}"\n{text}\n{entry}\n'
    mark = hashlib.sha256((source + _HEADER.read_text() + " ".join(flags)).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / "fbs_kernels_emulated"
    folder.mkdir(exist_ok=True)
    library = folder / f"{mark[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "kernels.so"
            command = [
                str(COMPILER),
                "-x",
                "c++",
                "-std=c++17",
                "-O1",
                "-fPIC",
                "-shared",
                "-Wl,-Bsymbolic",
                "-w",
            ]
            subprocess.run(
                [*command, *flags, "-", "-o", str(made)], input=source.encode(), check=True
            )
            made.rename(library)
    return library
