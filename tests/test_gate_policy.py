"""The policy that gates are sampled from: bounds and temperature by hand, and noise that stands for both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_policy_probability_by_hand() -> None:
    prob = torch.tensor([0.001, 0.02, 0.3, 0.9, 0.999])
    clipped = GatePolicy(bound=ProbabilityBound.CLIP).probability(prob)
    assert clipped.tolist() == pytest.approx([0.02, 0.02, 0.3, 0.9, 0.98])
    mixed = GatePolicy(bound=ProbabilityBound.MIX, low=0.2, high=0.8).probability(prob)
    blockdrop = 0.8 * prob + 0.2 * (1 - prob)  # α = 0.8
    assert torch.allclose(mixed, blockdrop)
    sharp = GatePolicy(temperature=0.5, bound=ProbabilityBound.CLIP).probability(prob)
    odds = (0.3 / 0.7) ** 2
    assert float(sharp[2]) == pytest.approx(odds / (1 + odds))


@given(
    bound=st.sampled_from(list(ProbabilityBound)),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    seed=st.integers(0, 10**6),
)
@PROPERTY
def test_noise_against_p_decides_like_uniform_against_the_policy(
    bound: ProbabilityBound, temperature: float, seed: int
) -> None:
    policy = GatePolicy(bound=bound, temperature=temperature)
    uniform = gate_uniform(torch.tensor([seed]), torch.arange(400).unsqueeze(0), 1)
    prob = (3 * draw(1, 400, seed=seed)).clamp(-6, 6).sigmoid()
    wanted = policy.probability(prob)
    clear = (uniform - wanted).abs() > 1e-5  # rounding decides the others
    assert clear.float().mean() > 0.95
    decided = policy.noise(uniform) < prob
    assert torch.equal(decided[clear], (uniform < wanted)[clear])
