"""Reward, advantages and loss together, on bandits whose best policy is known by enumeration (SPEC 10).

Two gates a column, one logit each. Skipping saves FLOPs of its gate and damages the next token's NLL by an
amount that hangs on the column and on what else is skipped; some damage spills to the token after it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fbs_rl.rl.advantages import (
    AdvantageSettings,
    Baseline,
    Credit,
    SegmentRow,
    compute_advantages,
)
from fbs_rl.rl.critic import ValueHead
from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.rl.ppo_loss import (
    LossInputs,
    PPOLossSettings,
    Ratio,
    ValueInputs,
    log_probability,
    ppo_loss,
)
from fbs_rl.rl.reward import (
    EpisodeReward,
    QualityTokens,
    RewardSettings,
    Sampler,
    SegmentKind,
    SegmentOutcome,
    episode_reward,
    skip_gain,
)

GATES, ROLLOUTS, STEPS, EPOCHS = 2, 32, 50, 2
ONE = [[0.15, 1.2, 0.0]]
"""Damage of one column in nats: by skipping gate 0, gate 1, and both at once in addition."""
FOUR = [[0.15, 1.2, 0.0], [1.5, 0.1, 0.0], [0.5, 0.1, 1.0], [0.1, 0.1, 0.1]]


@dataclass(frozen=True)
class Bandit:
    """damage_T3: as in ONE. spill: share of the damage that the token after the next one takes too."""

    damage_T3: Tensor
    spill: float
    settings: RewardSettings

    @property
    def columns(self) -> int:
        return len(self.damage_T3)

    def saved_flops(self) -> Tensor:
        """By layer and column: gate 0 saves a third and gate 1 half of 600."""
        return torch.tensor([[200], [300]]).expand(GATES, self.columns)

    def outcome(self, skip_LT: Tensor) -> SegmentOutcome:
        dense_T = torch.full((self.columns,), 600)
        skip_LT = skip_LT.long()
        one, other, both = self.damage_T3.unbind(1)
        damage_T = one * skip_LT[0] + other * skip_LT[1] + both * skip_LT[0] * skip_LT[1]
        nll_N = torch.zeros(self.columns + 1, dtype=torch.float64)
        nll_N[1:] += damage_T
        nll_N[2:] += self.spill * damage_T[:-1]
        flops_T = dense_T - (self.saved_flops() * skip_LT).sum(0)
        return SegmentOutcome(SegmentKind.GOLD, flops_T, dense_T, nll_N, torch.zeros_like(nll_N))

    def actions(self) -> list[Tensor]:
        """All z [L, T]."""
        every = itertools.product([False, True], repeat=GATES * self.columns)
        return [torch.tensor(bits).view(GATES, self.columns) for bits in every]

    @cached_property
    def rewards(self) -> dict[tuple[bool, ...], EpisodeReward]:
        """Of every z, by its bits: nothing here is random but the actions."""
        return {
            tuple(skip_LT.flatten().tolist()): episode_reward(
                [self.outcome(skip_LT)], self.settings
            )
            for skip_LT in self.actions()
        }

    def reward(self, skip_LT: Tensor) -> EpisodeReward:
        return self.rewards[tuple(skip_LT.flatten().tolist())]

    def best(self, sign: float = 1.0) -> Tensor:
        """The z with the highest reward, or with −1 the lowest."""
        return max(self.actions(), key=lambda skip_LT: sign * self.reward(skip_LT).total)


def bandit(damage: list[list[float]], spill: float = 0.0) -> Bandit:
    table_T3 = torch.tensor(damage, dtype=torch.float64)
    return Bandit(table_T3, spill, RewardSettings(beta=1.0, lam=1.0))


def train(
    task: Bandit,
    seed: int,
    credit: AdvantageSettings,
    loss: PPOLossSettings,
    policy: GatePolicy,
    sign: float = 1.0,
    start: float = 0.0,
    analytic: bool = False,
) -> Tensor:
    """The gates' p [L, T] after training with rewards times `sign`."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    logit_LT = torch.full((GATES, task.columns), start, requires_grad=True)
    head, state_BTd = ValueHead(task.columns), torch.eye(task.columns).unsqueeze(0)
    adam = torch.optim.Adam([logit_LT, *head.parameters()], lr=0.08)
    shape = (GATES, ROLLOUTS, task.columns)
    for _ in range(STEPS):
        with torch.no_grad():
            policy_LBT = policy.probability(logit_LT.sigmoid()).unsqueeze(1).expand(shape)
            skip_LBT = torch.rand(shape, generator=noise) < policy_LBT
            value_BT = head(state_BTd).expand(ROLLOUTS, -1)
        rewards = [task.reward(skip_LT) for skip_LT in skip_LBT.unbind(1)]
        shares = [sign * (r.quality_shares if analytic else r.shares)[0] for r in rewards]
        rows = [
            SegmentRow("task", SegmentKind.GOLD, share_T, float(share_T.sum()), value_T)
            for share_T, value_T in zip(shares, value_BT, strict=True)
        ]
        found = compute_advantages(rows, credit)
        gain_LT = sign * skip_gain(task.saved_flops(), 600 * task.columns, task.settings)
        inputs = LossInputs(
            prob_LBT=policy_LBT,
            skip_LBT=skip_LBT,
            old_logp_LBT=log_probability(policy_LBT, skip_LBT),
            decides_LBT=torch.ones(shape, dtype=torch.bool),
            advantage_BT=torch.stack(found.advantage).float(),
            skip_gain_LBT=(gain_LT / found.divisor[0]).unsqueeze(1).expand(shape) if analytic else None,
        )  # fmt: skip
        for _ in range(EPOCHS):
            now = replace(inputs, prob_LBT=logit_LT.sigmoid().unsqueeze(1).expand(shape))
            if found.value_target:
                value_now_BT = head(state_BTd).expand(ROLLOUTS, -1)
                target_BT = torch.stack(found.value_target).float()
                now = replace(now, values=ValueInputs(value_now_BT, value_BT, target_BT))
            adam.zero_grad()
            ppo_loss(now, loss, policy).loss.backward()
            clip_grad_norm_([logit_LT], 1.0)
            adam.step()
    return logit_LT.detach().sigmoid()


DEFAULT = AdvantageSettings(), PPOLossSettings(), GatePolicy(bound=ProbabilityBound.CLIP)
VARIANTS: dict[str, tuple[AdvantageSettings, PPOLossSettings, GatePolicy]] = {
    "default": DEFAULT,
    "critic": (
        AdvantageSettings(credit=Credit.EPISODE, baseline=Baseline.CRITIC),
        PPOLossSettings(value_clip=0.2),
        GatePolicy(bound=ProbabilityBound.CLIP),
    ),
    "group": (
        AdvantageSettings(credit=Credit.TO_GO, baseline=Baseline.GROUP),
        PPOLossSettings(),
        GatePolicy(bound=ProbabilityBound.MIX),
    ),
    "batch, ratio per token": (
        AdvantageSettings(window_tokens=2, baseline=Baseline.BATCH),
        PPOLossSettings(ratio=Ratio.TOKEN),
        GatePolicy(bound=ProbabilityBound.CLIP),
    ),
    "joint ratio": (
        AdvantageSettings(credit=Credit.EPISODE),
        PPOLossSettings(ratio=Ratio.JOINT),
        GatePolicy(bound=ProbabilityBound.CLIP),
    ),
}


def chosen(prob_LT: Tensor) -> Tensor:
    """The actions of a policy that has made up its mind."""
    assert ((prob_LT > 0.8) | (prob_LT < 0.2)).all(), prob_LT
    return prob_LT > 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_finds_the_optimum_of_a_two_gate_bandit(seed: int) -> None:
    task = bandit(ONE)
    assert task.best().tolist() == [[True], [False]]
    assert torch.equal(chosen(train(task, seed, *DEFAULT)), task.best())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_ppo_finds_the_optimum_over_tokens(variant: str, seed: int) -> None:
    """Each column has another best action, all of them among 256, and damage spills over."""
    task = bandit(FOUR, spill=0.3)
    assert task.best().T.tolist() == [[True, False], [False, True], [False, True], [True, True]]
    assert torch.equal(chosen(train(task, seed, *VARIANTS[variant])), task.best())


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_finds_it_with_the_analytic_compute_gradient(seed: int) -> None:
    task = bandit(FOUR, spill=0.3)
    assert torch.equal(chosen(train(task, seed, *DEFAULT, analytic=True)), task.best())


@pytest.mark.parametrize("damage", [ONE, FOUR])
def test_a_reward_of_the_wrong_sign_leads_elsewhere(damage: list[list[float]]) -> None:
    """The control: the same code then finds the worst actions, so it is the reward that it follows."""
    task = bandit(damage)
    found = chosen(train(task, 0, *DEFAULT, sign=-1.0))
    assert torch.equal(found, task.best(sign=-1.0))
    assert task.reward(found).total < task.reward(task.best()).total


@pytest.mark.parametrize("quality", list(QualityTokens))
def test_gold_quality_alone_is_best_off_skipping_everything_generated(
    quality: QualityTokens,
) -> None:
    """The paper's literal reward by enumeration (SPEC 8.1); with `gold+self` skipping has a price."""
    task = bandit(FOUR)
    settings = replace(task.settings, quality=quality)
    gold = task.outcome(torch.zeros(GATES, task.columns))

    def total(skip_LT: Tensor) -> float:
        own = replace(task.outcome(skip_LT), kind=SegmentKind.SELF, sampled_by=Sampler.DENSE)
        return episode_reward([own, gold], settings).total

    best = max(task.actions(), key=total)
    assert bool(best.all()) == (quality is QualityTokens.GOLD)


def test_a_gate_beyond_the_clip_learns_nothing_and_one_beyond_the_mixed_bound_does() -> None:
    task, still = bandit(FOUR), PPOLossSettings(entropy_coef=0.0)
    p = torch.full((GATES, 4), -4.0).sigmoid()
    assert p.max() < GatePolicy(bound=ProbabilityBound.CLIP).low
    clipped = train(task, 0, DEFAULT[0], still, GatePolicy(bound=ProbabilityBound.CLIP), start=-4.0)
    assert torch.equal(clipped, p)
    mixed = train(task, 0, DEFAULT[0], still, GatePolicy(bound=ProbabilityBound.MIX), start=-4.0)
    assert torch.equal(mixed > 10 * p, task.best())
