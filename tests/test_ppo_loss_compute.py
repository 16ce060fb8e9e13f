"""The analytic gradient of saved compute, against the expectation written out and against sampled actions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fbs_rl.rl.ppo_loss import LossInputs, Ratio, StepCounts, log_probability, ppo_loss
from tests.loss_inputs import BARE, COLUMNS, POLICY, ROWS, SHAPE, draw, random_inputs, some_mask


@pytest.mark.parametrize("ratio", list(Ratio))
def test_analytic_compute_gradient_is_the_expected_one(ratio: Ratio) -> None:
    """At the sampling policy: −Σ c ∂p/∂logit over the units' number, and no value of its own."""
    gain_LBT = draw(*SHAPE, seed=6).abs()
    decides_LBT = some_mask()
    logit_LBT, inputs = random_inputs(moved=0.0, decides_LBT=decides_LBT, skip_gain_LBT=gain_LBT)
    inputs = replace(inputs, advantage_BT=torch.zeros(ROWS, COLUMNS))
    options = replace(BARE, ratio=ratio)
    found = ppo_loss(inputs, options, POLICY)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(found.loss, logit_LBT)
    prob_LBT = logit_LBT.detach().sigmoid()
    units = StepCounts.of(decides_LBT, ratio).units
    wanted = -gain_LBT * prob_LBT * (1 - prob_LBT) / units
    assert torch.allclose(gradient, torch.where(decides_LBT, wanted, 0.0), atol=1e-6)


def test_analytic_gradient_is_the_mean_of_the_sampled_one() -> None:
    """Over both actions of one gate, weighted by their probability: what it replaces, without its noise."""
    prob = torch.tensor([[[0.3]]], requires_grad=True)
    decides = torch.ones(1, 1, 1, dtype=torch.bool)
    gain, expected = 0.7, 0.0
    for skip in (True, False):
        skip_LBT = torch.full((1, 1, 1), skip)
        logp_LBT = log_probability(prob, skip_LBT)
        advantage_BT = torch.tensor([[gain if skip else 0.0]])
        inputs = LossInputs(prob, skip_LBT, logp_LBT.detach(), decides, advantage_BT)
        (sampled,) = torch.autograd.grad(ppo_loss(inputs, BARE, POLICY).loss, prob)
        expected += float(sampled) * float(logp_LBT.detach().exp())
        analytic = replace(
            inputs, advantage_BT=torch.zeros(1, 1), skip_gain_LBT=torch.full((1, 1, 1), gain)
        )
        (exact,) = torch.autograd.grad(ppo_loss(analytic, BARE, POLICY).loss, prob)
        assert float(exact) == pytest.approx(-gain)
    assert expected == pytest.approx(-gain)


def test_analytic_gradient_stops_where_the_ratio_is_clipped() -> None:
    """p_old = 0.5 and clip 0.2: at p = 0.61 both ratios, 1.22 and 0.78, are outside."""
    skip = torch.ones(1, 1, 1, dtype=torch.bool)
    old = torch.full((1, 1, 1), 0.5).log()
    for p, wanted in [(0.55, -1.0), (0.61, 0.0), (0.30, -1.0)]:
        prob = torch.full((1, 1, 1), p, requires_grad=True)
        inputs = LossInputs(prob, skip, old, skip, torch.zeros(1, 1), None, torch.ones(1, 1, 1))
        (gradient,) = torch.autograd.grad(ppo_loss(inputs, BARE, POLICY).loss, prob)
        assert float(gradient) == pytest.approx(wanted)
