"""How far the learner's gates lie from the rollout engine's on the same actions: other kernels, other numbers.

Shape letters: L layers, B rows, C gate columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.learner_settings import MismatchLimits
from fbs_rl.rl.ppo_loss import gate_divergence, log_probability
from fbs_rl.rl.ranks import Ranks


class MismatchError(ValueError):
    """Rollout engine and learner disagree more than a run can stand."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Of p_b over `decisions` at `columns` gate columns.

    logp_max: largest |Δ log p_b(z)|, nats. kl: mean KL(rollout ‖ learner), nats. flip_rate: share of
    decisions that the rollout's own noise would have drawn differently from the learner's p.
    """

    columns: int
    decisions: int
    logp_max: float
    kl: float
    flip_rate: float

    def check(self, limits: MismatchLimits) -> None:
        """Raise MismatchError, in one sentence, if a figure is beyond its limit."""
        if self.columns < limits.tokens:
            raise ValueError(
                f"the self-test saw {self.columns} gate columns and needs {limits.tokens}; give it more rollouts"
            )
        figures = (
            ("|Δ log p|", self.logp_max, limits.logp_max),
            ("KL", self.kl, limits.kl),
            ("share of flipped decisions", self.flip_rate, limits.flip_frac),
        )
        for name, found, limit in figures:
            if not found <= limit:  # NaN is beyond every limit
                raise MismatchError(
                    f"rollout engine and learner disagree on {self.decisions} gate decisions: their {name} is "
                    f"{found:.3g}, above {limit:g}; give both the same weights, policy and never_skip, or look "
                    f"at the precision of either"
                )


class MismatchSums:
    """Adds up a Mismatch over batches, and at the end over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.largest = torch.zeros(1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        decides_LBC: Tensor,
        skip_LBC: Tensor,
        rollout_prob_LBC: Tensor,
        prob_LBC: Tensor,
        uniform_LBC: Tensor,
        policy: GatePolicy,
    ) -> None:
        """uniform_LBC: the noise that the rollout drew with, before the policy. Probabilities are the gate's p."""
        skip = skip_LBC[decides_LBC]
        theirs = policy.probability(rollout_prob_LBC[decides_LBC].double())
        mine = policy.probability(prob_LBC[decides_LBC].double())
        moved = (log_probability(mine, skip) - log_probability(theirs, skip)).abs()
        drawn = policy.noise(uniform_LBC[decides_LBC]) < prob_LBC[decides_LBC]
        columns = decides_LBC.any(0).sum()
        parts = (columns, decides_LBC.sum(), gate_divergence(theirs, mine).sum(), (drawn != skip).sum())  # fmt: skip
        self.sums += torch.stack([part.double() for part in parts])
        self.largest = torch.cat((self.largest, moved)).max().unsqueeze(0)  # NaN stays NaN

    def total(self, ranks: Ranks) -> Mismatch:
        columns, decisions, divergence, flips = ranks.sum(self.sums.clone()).tolist()
        largest = float(ranks.largest(self.largest.clone()))
        count = max(decisions, 1.0)
        return Mismatch(int(columns), int(decisions), largest, divergence / count, flips / count)
