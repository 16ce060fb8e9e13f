"""The value head of "PPO with a critic" (SPEC 8.5), the paper's setting; the default needs none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHead(nn.Module):
    """V(h) = w·SiLU(W·RMSNorm(h) + b) + c, in float32, of the state h that enters the boundary layer.

    V starts at 0. It reads h without gradient: fitting values must not move what the gates read.
    Limit: decisions of the same column in layers before the boundary layer are already in h, so V is a
    baseline that depends on these actions and biases their gradient; protect those layers, or accept it.
    """

    def __init__(self, hidden_size: int, width: int = 128, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.hidden = nn.Linear(hidden_size, width, dtype=torch.float32)
        self.out = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, state_BTd: Tensor) -> Tensor:
        """V [B, T], float32."""
        normed_BTd = F.rms_norm(state_BTd.detach().float(), state_BTd.shape[-1:], eps=self.eps)
        return self.out(F.silu(self.hidden(normed_BTd))).squeeze(-1)


def explained_variance(value: Tensor, target: Tensor) -> float:
    """1 − Var(G − V) / Var(G): 1 is perfect, 0 no better than a constant; NaN where G does not vary.

    value, target: of the same columns, any equal shape, padding left out.
    """
    assert value.shape == target.shape
    target = target.double()
    spread = float(target.var(correction=0)) if target.numel() else 0.0
    if spread == 0.0:
        return float("nan")
    return 1.0 - float((target - value.double()).var(correction=0)) / spread
