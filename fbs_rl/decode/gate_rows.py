"""A gate's small weights behind each other, as its decision's warps take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.skip_gate import SkipGate

PANEL = 64  # of kernels/gate.cu: rows and columns have zeros behind them up to multiples of this


@dataclass(slots=True)
class GateRows:
    """W_3 of W_1 x̂, W_3 of the rest, W_2, the bias of W_3, w, the norm of W_1 x̂ and b of one gate, as GateRoom of
    kernels/gate.cu finds them; its W_1 is in FrontRows."""

    weight_N: Tensor

    @classmethod
    def of(cls, gate: SkipGate) -> GateRows:
        made = cls(gate.out.weight.new_zeros(sum(part.numel() for part in _parts(gate))))
        made.copy(gate)
        return made

    @torch.no_grad()
    def copy(self, gate: SkipGate) -> None:
        """Take the gate's present weights."""
        at = 0
        for part in _parts(gate):
            self.weight_N[at : at + part.numel()] = part.flatten()
            at += part.numel()


def span(count: int) -> int:
    """Rows or columns with the zeros behind them."""
    return -(-count // PANEL) * PANEL


def _parts(gate: SkipGate) -> Iterator[Tensor]:
    reduced = gate.reduce.out_features if gate.reads_residual else 0
    yield _panel(gate.hidden.weight[:, :reduced])
    yield _panel(gate.hidden.weight[:, reduced:])
    if gate.reads_preview:
        yield _panel(gate.preview.weight)
    yield _panel(gate.hidden.bias)
    yield _panel(gate.out.weight[0])
    if gate.reads_residual:
        yield _panel(gate.reduce_norm.weight)
    yield gate.out.bias


def _panel(weight: Tensor) -> Tensor:
    """With the zeros."""
    padding = [end for size in reversed(weight.shape) for end in (0, span(size) - size)]
    return F.pad(weight, padding)
