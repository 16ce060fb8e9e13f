"""Random inputs of the PPO loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.rl.ppo_loss import LossInputs, PPOLossSettings, log_probability

LAYERS, ROWS, COLUMNS = 3, 4, 5
SHAPE = (LAYERS, ROWS, COLUMNS)
POLICY = GatePolicy(bound=ProbabilityBound.CLIP)
BARE = PPOLossSettings(entropy_coef=0.0, kl_coef=0.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(seed: int = 0, moved: float = 0.5, **others: Any) -> tuple[Tensor, LossInputs]:
    """Logits (the leaf), and inputs whose policy has moved from the one that sampled."""
    old_LBT = draw(*SHAPE, seed=seed)
    logit_LBT = (old_LBT + moved * draw(*SHAPE, seed=seed + 1)).requires_grad_()
    skip_LBT = draw(*SHAPE, seed=seed + 2) > 0
    inputs = LossInputs(
        prob_LBT=logit_LBT.sigmoid(),
        skip_LBT=skip_LBT,
        old_logp_LBT=log_probability(POLICY.probability(old_LBT.sigmoid()), skip_LBT),
        decides_LBT=torch.ones(SHAPE, dtype=torch.bool),
        advantage_BT=draw(ROWS, COLUMNS, seed=seed + 3),
    )
    return logit_LBT, replace(inputs, **others)


def some_mask(seed: int = 0) -> Tensor:
    """Not everywhere; one column and one row hold no decision."""
    decides_LBT = draw(*SHAPE, seed=seed + 40) > -0.3
    decides_LBT[:, 1, 2] = False
    decides_LBT[:, 3] = False
    return decides_LBT
