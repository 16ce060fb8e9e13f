"""What a program's calls are told: ctypes structures read from the kernels' own source, so that they cannot differ."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

from torch import Tensor

from fbs_rl.c_structures import read_structure, structure_bodies
from fbs_rl.decode.kernel_source import kernel_text

_POINTED = ("num", "unsigned char", "u16", "u64", "Call")
_CASE = re.compile(r"^    case (\d+): (\w+)\(\*\(const (\w+)\*\)c\.arguments", re.M)
_PRODUCT = re.compile(r"^  PRODUCT\((\d+), (\w+), (\w+), (\w+)\)", re.M)


class Void(IntEnum):
    """When a call with flags has nothing to do: as is_void in kernels/program.cu has it."""

    NOBODY_RUNS = 0
    NO_CHUNK_CLOSES = 1
    SOME_ROW_RUNS = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """What a call of one name is: its number in the source, its arguments, what a product reads and writes ("" for
    others)."""

    number: int
    arguments: type[ctypes.Structure]
    reads: str
    writes: str


@dataclass(slots=True)
class Call:
    """One call of a program.

    room_bytes: shared memory that it works in. quiet: nobody waits for it, because every block makes all of it by
    itself, or because what it leaves is read behind another call that all wait for; with quiet_flags, only where all
    rows skip, or, by quiet_where, where one runs. void_flags, void_where: flags of who skips, or of which chunks close,
    and when there is nothing to do; also_flags, also_where: a second reason. sets: flags that it writes. held: tensors
    that its arguments point into.
    """

    name: str
    arguments: Any
    held: tuple[Tensor, ...]
    room_bytes: int = 0
    quiet: bool = False
    quiet_flags: Tensor | None = None
    quiet_where: Void = Void.NOBODY_RUNS
    void_flags: Tensor | None = None
    void_where: Void = Void.NOBODY_RUNS
    also_flags: Tensor | None = None
    also_where: Void = Void.NOBODY_RUNS
    sets: tuple[Tensor, ...] = ()

    @property
    def kind(self) -> Kind:
        return kinds()[self.name]

    def tell(self, **values: Any) -> None:
        """More of its arguments, as make_call takes them."""
        held: list[Tensor] = []
        _fill(self.name, self.arguments, values, held)
        self.held = (*self.held, *held)

    @property
    def is_product(self) -> bool:
        return bool(self.kind.writes)


@lru_cache(maxsize=1)
def structures() -> Mapping[str, type[ctypes.Structure]]:
    """Every structure of the source that can be told of in C types, by name."""
    bodies = structure_bodies(kernel_text())
    inner = ("Weights", "SkipPath")
    known = {name: read_structure(name, bodies[name], {}, _POINTED) for name in inner}
    named = {kind for _, _, kind in _CASE.findall(kernel_text())} | {"Product", "Program"}
    return known | {name: read_structure(name, bodies[name], known, _POINTED) for name in named}


@lru_cache(maxsize=1)
def kinds() -> Mapping[str, Kind]:
    """Every call by its name."""
    text, known = kernel_text(), structures()
    found = {name: Kind(int(n), known[kind], "", "") for n, name, kind in _CASE.findall(text)}
    products = {name: Kind(int(n), known["Product"], *ends) for n, name, *ends in _PRODUCT.findall(text)}  # fmt: skip
    return found | products


def make_call(name: str, room_bytes: int = 0, **values: Any) -> Call:
    """A call by its name. Values are tensors (their address), None, numbers, lists of these, or a dict of them for a
    structure in the structure.

    What is not named is 0 or null. Raises KeyError for a call or an argument that does not exist.
    """
    arguments: Any = kinds()[name].arguments()
    held: list[Tensor] = []
    _fill(name, arguments, values, held)
    return Call(name, arguments, tuple(held), room_bytes)


def _fill(name: str, arguments: Any, values: Mapping[str, Any], held: list[Tensor]) -> None:
    unknown = values.keys() - {field[0] for field in arguments._fields_}
    if unknown:
        raise KeyError(f"{name} takes no {', '.join(sorted(unknown))}")
    for field, value in values.items():
        if isinstance(value, dict):
            _fill(name, getattr(arguments, field), value, held)
        elif isinstance(value, (list, tuple)):
            for place, one in enumerate(value):
                getattr(arguments, field)[place] = _plain(one, held)
        else:
            setattr(arguments, field, _plain(value, held))


def _plain(value: Any, held: list[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    held.append(value)
    return value.data_ptr()
