"""A gate's small weights behind each other, so that one copy brings all that its decision needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fbs_rl.model.skip_gate import SkipGate

_ALIGNED = 8  # parts begin at multiples of this, as in GateRoom of kernels/gate.cu


@dataclass(slots=True)
class GateRows:
    """W_3, W_2, the bias of W_3, w, the norm of W_1 x̂ and b of one gate; its W_1 is in FrontRows."""

    weight_N: Tensor

    @classmethod
    def of(cls, gate: SkipGate) -> GateRows:
        count = sum(-(-part.numel() // _ALIGNED) * _ALIGNED for part in _parts(gate))
        made = cls(gate.out.weight.new_zeros(count))
        made.copy(gate)
        return made

    @torch.no_grad()
    def copy(self, gate: SkipGate) -> None:
        """Take the gate's present weights."""
        at = 0
        for part in _parts(gate):
            self.weight_N[at : at + part.numel()] = part.flatten()
            at += -(-part.numel() // _ALIGNED) * _ALIGNED


def _parts(gate: SkipGate) -> Iterator[Tensor]:
    yield gate.hidden.weight
    if gate.reads_preview:
        yield gate.preview.weight
    yield gate.hidden.bias
    yield gate.out.weight
    if gate.reads_residual:
        yield gate.reduce_norm.weight
    yield gate.out.bias
