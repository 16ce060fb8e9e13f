"""The skip path: what a token passes through instead of a skipped layer (SPEC 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fbs_rl.model.configuration import FBSConfig


class SkipAdapter(nn.Module):
    """h + A_2·SiLU(A_1·RMSNorm(h)), rank `adapter_rank`; A_2 = 0 at the start, so it begins as the identity."""

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.adapter_rank, bias=False)  # A_1
        self.up = nn.Linear(config.adapter_rank, config.hidden_size, bias=False)  # A_2

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, state_BTd: Tensor, normed_BTd: Tensor) -> Tensor:
        """state_BTd: h. normed_BTd: RMSNorm(h) without weight, which the gate needed already."""
        return state_BTd + self.up(F.silu(self.down(normed_BTd)))


class SkipIdentity(nn.Module):
    """h unchanged."""

    def reset_parameters(self) -> None: ...

    def forward(self, state_BTd: Tensor, normed_BTd: Tensor) -> Tensor:
        return state_BTd
