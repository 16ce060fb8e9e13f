"""Settings: one frozen dataclass tree per command, read from a YAML file and dotted overrides.

A key that does not exist, or a value of the wrong type, is refused in a sentence that names the key
and the nearest one there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans, so that `off` stays the word it looks like."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if first in "tTfF" or not tag.endswith(":bool")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_settings(cls: type[T], file: str | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of `cls` from its defaults, then `file`, then `overrides` ("section.key=value").

    file: a YAML file, or the name of one that ships with the project (without ".yaml"); it says only what
    differs from the defaults. Raises FileNotFoundError or ValueError, in one sentence.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        path = find_settings(file)
        tree = _read_yaml(path)
        tree.pop("command", None)  # a run's own config.yaml names the command that made it
        _check_keys(cls, tree, str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"{override!r} is not of the form section.key=value")
        _check_override(cls, key)
        _put(tree, key.split("."), _value(key, text))
    return from_tree(cls, tree)


def from_tree(cls: type[T], tree: dict[str, Any]) -> T:
    """An instance of `cls` from nested dictionaries; ValueError, in one sentence, for a value that does not fit."""
    _check_keys(cls, tree, "the settings")
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{key} is not set, and it has no default") from None
        if first["type"] == "value_error":  # a sentence of the settings' own, which names its keys
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{key} is {first['input']!r}: {reason}") from None


def find_settings(name: str) -> Path:
    """The file `name`, or the shipped one of that name; FileNotFoundError lists what there is."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(files("configs")))
    inside = shipped / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and inside.is_file():
        return inside
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise FileNotFoundError(f"{name}: no such settings file; the shipped ones are {names}")


def to_tree(settings: Any) -> dict[str, Any]:
    """Nested plain dictionaries, as config.yaml holds them."""
    return dataclasses.asdict(settings)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{path} is not readable YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, not a mapping of settings")
    return tree


def _value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ValueError(f"{key}={text}: the value is not readable; quote it as in YAML") from None


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):  # absent, or left empty in the file
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def _sections(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _keys(cls: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in _sections(cls).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{name}.")


def _check_keys(cls: Any, tree: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raise ValueError for the first key of `tree`, of the section at `prefix`, that does not exist."""
    sections = _sections(cls)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in sections:
            raise ValueError(f"{where}: unknown key {key}{_nearest(key, _keys(cls, prefix))}")
        if dataclasses.is_dataclass(sections[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key} must be a mapping, got {value!r}")
            _check_keys(sections[name], value, where, f"{key}.")
        elif isinstance(value, bool) and sections[name] is not bool:
            raise ValueError(
                f"{where}: {key} is {value!r}, which is no {_type_name(sections[name])}"
            )


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _check_override(cls: Any, key: str) -> None:
    """Raise ValueError unless `key` names one setting, or an entry of a free mapping such as model.options."""
    kind: Any = cls
    above = ""
    for name in key.split("."):
        if typing.get_origin(kind) is dict:
            return
        if not dataclasses.is_dataclass(kind):
            raise ValueError(
                f"{above} is a single setting and has no {key.removeprefix(above)[1:]}"
            )
        sections = _sections(kind)
        if name not in sections:
            raise ValueError(f"unknown key {key}{_nearest(key, _keys(cls))}")
        kind = sections[name]
        above = f"{above}.{name}" if above else name
    if dataclasses.is_dataclass(kind):
        names = ", ".join(f"{key}.{name}" for name in _sections(kind))
        raise ValueError(f"{key} is a section; set one of {names}")


def _nearest(key: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the most similar of `known`, by the whole key or by its last part."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not close:
        by_last = {name.rpartition(".")[2]: name for name in names}
        last = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)
        close = [by_last[name] for name in last]
    return f"; did you mean {close[0]}?" if close else ""
