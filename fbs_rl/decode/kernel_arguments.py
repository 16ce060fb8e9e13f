"""What kernels are called with: ctypes structures read from the kernels' own source, so that they cannot differ."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from fbs_rl.decode.kernel_source import kernel_text

_C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
    "u32": ctypes.c_uint,
}
_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.M | re.S)
_FIELD = re.compile(r"(?:const )?(num|int|float|long long|u32|unsigned char|u16)\s*(.*)")
_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )(\w+)\((\w+) \w\)', re.M
)
_PRODUCT = re.compile(r"^PRODUCT\((\w+),", re.M)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel call. held: tensors that its arguments point into."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: ctypes.Structure
    held: tuple[Tensor, ...]


@lru_cache(maxsize=1)
def kernel_structures() -> Mapping[str, type[ctypes.Structure]]:
    """The argument structure of every kernel, by the kernel's name."""
    text = kernel_text()
    bodies = dict(_STRUCT.findall(text))
    named = dict(_KERNEL.findall(text)) | dict.fromkeys(_PRODUCT.findall(text), "Product")
    kinds = {kind: _structure(kind, bodies[kind]) for kind in set(named.values())}
    return {kernel: kinds[kind] for kernel, kind in named.items()}


def _structure(name: str, body: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = []
    for statement in re.sub(r"//[^\n]*", "", body).split(";"):
        match = _FIELD.fullmatch(statement.strip())
        if match is None:
            continue
        kind, names = match.groups()
        for one in names.split(","):
            pointer, field, length = re.fullmatch(
                r"(\*?)\s*(\w+)(?:\[(\d+)\])?", one.strip()
            ).groups()  # pyright: ignore[reportOptionalMemberAccess]
            c_type = ctypes.c_void_p if pointer else _C_TYPES[kind]
            fields.append((field, c_type * int(length) if length else c_type))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def make_launch(
    kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int = 0, **values: Any
) -> Launch:
    """A call of `kernel`. Values are tensors (their address), None, numbers, or lists of these.

    What is not named is 0 or null. Raises KeyError for a kernel or an argument that does not exist.
    """
    kind = kernel_structures()[kernel]
    unknown = values.keys() - {field[0] for field in kind._fields_}
    if unknown:
        raise KeyError(f"{kernel} takes no {', '.join(sorted(unknown))}")
    arguments, held = kind(), []
    for name, value in values.items():
        listed = isinstance(value, (list, tuple))
        for place, one in enumerate(value if listed else [value]):
            if isinstance(one, Tensor):
                held.append(one)
                one = one.data_ptr()
            if listed:
                getattr(arguments, name)[place] = one
            else:
                setattr(arguments, name, one)
    return Launch(kernel, grid, threads, shared_bytes, arguments, tuple(held))
