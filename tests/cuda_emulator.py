"""Runs the decoder's CUDA source on a CPU: compiled by the system's C++ compiler, one fiber a CUDA thread."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from fbs_rl.decode.kernel_arguments import Launch
from fbs_rl.decode.kernel_source import KernelShape, kernel_text

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("cuda_emulator.h")


class EmulatedLauncher:
    """Stands in for a CUDA device: launches run at once, in the order of the calls."""

    device = torch.device("cpu")
    multiprocessors = 3

    def __init__(self, shape: KernelShape) -> None:
        self.library = ctypes.CDLL(str(_build(shape)))

    def launch(self, call: Launch) -> None:
        run = getattr(self.library, f"emulate_{call.kernel}")
        run.restype = ctypes.c_bool
        grid = (ctypes.c_uint * 3)(*call.grid)
        done = run(ctypes.byref(call.arguments), grid, call.threads, call.shared_bytes)
        assert done, (
            f"{call.kernel}: its threads wait for each other, or write behind their shared memory"
        )


def _build(shape: KernelShape) -> Path:
    text = kernel_text()
    kernels = re.findall(r'extern "C" __global__ void.*? (\w+)\((\w+) \w\)', text)
    kernels = [k for k in kernels if k[0] != "name"]
    kernels += [(name, "Product") for name in re.findall(r"^PRODUCT\((\w+),", text, re.M)]
    entries = "\n".join(
        f'extern "C" bool emulate_{name}(const void* a, const unsigned* grid, unsigned threads, unsigned bytes) {{\n'
        f"  return run_grid([](const void* p) {{ {name}(*(const {kind}*)p); }}, a, grid, threads, bytes);\n}}"
        for name, kind in kernels
    )
    flags = [f"-D{name}={value}" for name, value in shape.definitions().items()]
    source = f'#define EMULATED\n#include "{_HEADER}"\n{text}\n{entries}\n'
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
