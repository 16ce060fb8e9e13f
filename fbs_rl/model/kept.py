"""What is made of parameters and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Made = TypeVar("_Made")


class Kept(Generic[_Made]):
    """Something made from parameters, remade when one of them changed and at each pass that trains it."""

    def __init__(self) -> None:
        self._held: tuple[tuple, _Made] | None = None

    def forget(self) -> None:
        self._held = None

    @property
    def held(self) -> object:
        """What is kept now, for who reads it beyond the next change of a weight."""
        return self._held

    def get(self, make: Callable[[], _Made], trained: Tensor, *others: Tensor) -> _Made:
        """make(), or what it gave before. Gradients reach `trained` only."""
        if torch.is_grad_enabled() and trained.requires_grad:
            self.forget()  # an optimiser step follows, and some write through .data, unseen by _version
            return make()
        # In-place updates bump _version, replaced tensors change data_ptr.
        marks = tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
            for t in (trained, *others)
        )
        if self._held is None or self._held[0] != marks:
            with torch.inference_mode(False), torch.no_grad():  # later passes may need gradients
                self._held = (marks, make())
        return self._held[1]
