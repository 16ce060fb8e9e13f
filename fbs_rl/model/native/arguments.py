"""The structures of arguments.h as ctypes, and how they are filled."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fbs_rl.c_structures import read_structure, structure_bodies

SOURCE = Path(__file__).parent
_POINTED = ("void", "unsigned char")


@lru_cache(maxsize=1)
def structures() -> dict[str, type[ctypes.Structure]]:
    """Every structure of arguments.h by its name."""
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in structure_bodies((SOURCE / "arguments.h").read_text()).items():
        found[name] = read_structure(name, body, found, _POINTED)
    return found


def fill(structure: Any, **values: Any) -> Any:
    """The structure with these fields set: numbers, None, or tensors, whose addresses are meant."""
    names = _field_names(type(structure))
    for name, value in values.items():
        assert name in names, f"{type(structure).__name__} has no {name}"
        setattr(structure, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return structure


@lru_cache
def _field_names(kind: Any) -> frozenset[str]:
    return frozenset(field[0] for field in kind._fields_)


def linear(weight: Tensor, bias: Tensor | None = None) -> Any:
    """A Linear of these tensors, which must be contiguous."""
    assert weight.is_contiguous()
    return fill(structures()["Linear"](), weight=weight, bias=bias)
