"""C structures as ctypes, read from the source that declares them, so that the two cannot differ."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping
from typing import Any

_STRUCT = re.compile(r"^struct (\w+) \{[^\n]*\n(.*?)^\};", re.M | re.S)
_DECLARED = re.compile(r"(\*?)\s*(\w+)(?:\[(\d+)\])?")
_PLAIN: dict[str, Any] = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "long long": ctypes.c_longlong,
    "u32": ctypes.c_uint,
}


def structure_bodies(text: str) -> dict[str, str]:
    """What stands between the braces of every structure of a source, by its name."""
    return dict(_STRUCT.findall(text))


def read_structure(
    name: str, body: str, known: Mapping[str, Any], pointed: Iterable[str]
) -> type[ctypes.Structure]:
    """The structure with these members: numbers, `known` structures, arrays of them, and pointers to anything.

    pointed: types of which there are only pointers. A statement of another type is no member.
    """
    kinds = "|".join(map(re.escape, (*_PLAIN, *known, *pointed)))
    member = re.compile(rf"(?:const )?({kinds})\b\s*(.*)", re.S)
    fields: list[tuple[str, Any]] = []
    for statement in re.sub(r"//[^\n]*", "", body).split(";"):
        match = member.fullmatch(statement.strip())
        if match is None:
            continue
        kind, declared = match.groups()
        for one in declared.split(","):
            found = _DECLARED.fullmatch(one.strip())
            assert found is not None, f"{name} declares {one.strip()!r}"
            pointer, field, length = found.groups()
            c_type = ctypes.c_void_p if pointer else known.get(kind) or _PLAIN[kind]
            fields.append((field, c_type * int(length) if length else c_type))
    return type(name, (ctypes.Structure,), {"_fields_": fields})
