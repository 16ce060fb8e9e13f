"""The structures of arguments.h as ctypes, read from that file, so that they cannot differ."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

SOURCE = Path(__file__).parent
_STRUCT = re.compile(r"^struct (\w+) \{.*?\n(.*?)^\};", re.M | re.S)
_FIELD = re.compile(
    r"(?:const )?(int|float|long long|unsigned char|void|\w+(?:Arguments)?)\s*(\*?.*)"
)
_PLAIN: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
}


@lru_cache(maxsize=1)
def structures() -> dict[str, type[ctypes.Structure]]:
    """Every structure of arguments.h by its name."""
    found: dict[str, type[ctypes.Structure]] = {}
    text = re.sub(r"//[^\n]*", "", (SOURCE / "arguments.h").read_text())
    for name, body in _STRUCT.findall(text):
        fields: list[tuple[str, Any]] = []
        for statement in body.split(";"):
            match = _FIELD.fullmatch(" ".join(statement.split()))
            if match is None:
                continue
            kind, names = match.groups()
            for one in names.split(","):
                pointer = one.strip().startswith("*")
                plain = _PLAIN.get(kind) or found.get(kind)
                fields.append((one.strip(" *"), ctypes.c_void_p if pointer else plain))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def fill(structure: Any, **values: Any) -> Any:
    """The structure with these fields set: numbers, None, or tensors, whose addresses are meant."""
    names = {field[0] for field in structure._fields_}
    for name, value in values.items():
        assert name in names, f"{type(structure).__name__} has no {name}"
        setattr(structure, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return structure


def linear(weight: Tensor | None, bias: Tensor | None = None) -> Any:
    """A Linear of these tensors, which must be contiguous; nothing where there is no weight."""
    assert weight is None or weight.is_contiguous()
    return fill(structures()["Linear"](), weight=weight, bias=bias)
