"""The compiled step: built by the machine's C++ compiler when it is first needed, and kept for later processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

from fbs_rl.model.native.arguments import SOURCE

SWITCH = "FBS_NATIVE"
"""Environment variable: 0 keeps decoding on torch's operations."""
_FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The library; None, with one warning, where it cannot be had, and without one where it is switched off."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = next(
        filter(None, (shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "c++") if c)),
        None,
    )
    if compiler is None:
        return _without("no C++ compiler was found")
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["it said nothing"]
        return _without(f"{compiler} failed ({said[-1]})")
    except OSError as error:
        return _without(str(error))


def _without(reason: str) -> None:
    warnings.warn(
        f"decoding on this CPU goes through torch's operations, at about half the speed: {reason}; "
        f"{SWITCH}=0 says that this is meant",
        stacklevel=3,
    )


def _built(compiler: str) -> Path:
    """The shared library for this source, compiler and processor. Raises CalledProcessError, OSError."""
    texts = [path.read_bytes() for path in sorted(SOURCE.glob("*.h"))]
    texts.append((SOURCE / "step.cpp").read_bytes())
    texts += [" ".join((compiler, *_FLAGS)).encode(), _processor().encode()]
    mark = hashlib.sha256(b"\0".join(texts)).hexdigest()[:24]
    folder = _folder()
    made = folder / f"step-{mark}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            new = Path(work) / "step.so"
            command = [compiler, *_FLAGS, str(SOURCE / "step.cpp"), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            new.rename(made)  # whole or not at all: other processes may be building it too
    return made


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "fbs_rl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home that can be written to
        folder = Path(tempfile.gettempdir()) / f"fbs_rl-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(
        [x for x in lines if x.startswith(("flags", "Features"))][:1]
    )
