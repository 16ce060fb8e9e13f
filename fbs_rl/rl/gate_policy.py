"""The policy that gate decisions are drawn from: the gate's p with a temperature and bounds (SPEC 8.5)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

P_MARGIN = 1e-6
"""Keeps logarithms of p finite; gates clip their logits to ±6, which is 2.5e-3."""


class ProbabilityBound(StrEnum):
    """How p is kept within [low, high].

    CLIP: p_b = clip(p, low, high). Inside, the policy is the gate's own. Outside, p_b does not depend on p:
    the surrogate has no gradient there, in either direction, so a gate that has left the range comes back only
    by the entropy bonus, the KL term (both are of p) or weights it shares.
    MIX: p_b = low + (high − low)·p (BlockDrop's bound). It bends every p a little and has a gradient everywhere.
    """

    CLIP = "clip"
    MIX = "mix"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePolicy:
    """p_b = bound(σ(logit(p) / temperature)), the probability that decisions are drawn with."""

    temperature: float = 1.0
    low: float = 0.02
    high: float = 0.98
    bound: ProbabilityBound = ProbabilityBound.MIX

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < 1:
            raise ValueError(
                f"the bounds of the gates' probability are {self.low} and {self.high}; "
                f"give two numbers strictly between 0 and 1, the lower first"
            )
        if not self.temperature > 0:
            raise ValueError(f"the gates' temperature is {self.temperature}; it must be above 0")

    def probability(self, prob: Tensor) -> Tensor:
        """p_b of the gate's p, any shape. At temperature 1 the value of p inside the clip is kept to the bit."""
        if self.temperature != 1.0:
            prob = torch.sigmoid(torch.logit(prob, eps=P_MARGIN) / self.temperature)
        if self.bound is ProbabilityBound.MIX:
            return self.low + (self.high - self.low) * prob
        return prob.clamp(self.low, self.high)

    def noise(self, uniform: Tensor) -> Tensor:
        """The number to compare p itself with: noise(u) < p where u < p_b, up to rounding.

        With it, an engine that samples by u < p samples from p_b and needs to know nothing of this class. −1
        stands for "whatever p is", 1 for "never".
        """
        if self.bound is ProbabilityBound.MIX:
            inner = (uniform - self.low) / (self.high - self.low)
            never, always = inner >= 1, inner < 0
        else:
            inner, never, always = uniform, uniform >= self.high, uniform < self.low
        if self.temperature != 1.0:
            inner = torch.sigmoid(torch.logit(inner, eps=P_MARGIN) * self.temperature)
        return inner.masked_fill(never, 1.0).masked_fill(always, -1.0)
