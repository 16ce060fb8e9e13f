"""Functions that training on a GPU runs through torch.compile, and everything else as written.

Compiled code rounds at other places, so it stays off unless a training process switches it on: inference
keeps the bit-equality with the backbone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_on = False


def compile_from_now_on() -> None:
    """Let the functions marked `compilable` be compiled when they are called next, in this process."""
    global _on
    _on = True
    # One entry per shape and per kind of layer; the default of 8 is reached by evaluation alone.
    torch._dynamo.config.cache_size_limit = 64  # pyright: ignore[reportAttributeAccessIssue]


def compiling() -> bool:
    """Whether compilation is switched on in this process."""
    return _on


@contextmanager
def as_written() -> Iterator[None]:
    """Nothing is compiled inside: passes of shapes and modes that occur a few times are not worth it."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def compilable(function: F) -> F:
    """`function`, which becomes its compiled form once compilation is switched on."""
    compiled: Any = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if not _on:
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=False)
        return compiled(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]
