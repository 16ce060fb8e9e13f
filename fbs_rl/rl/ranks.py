"""Sums over the ranks that share an update; of one rank, the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank `rank` of `count`, which have met in torch's default process group where there are several."""

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank {self.rank} of {self.count}; ranks count from 0")

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over ranks, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The maximum over ranks, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor
