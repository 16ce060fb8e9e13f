"""The parts of an episode that need no environment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from envs.decode_episode import TokenRule
from envs.episode import SegmentTrace
from fbs_rl.rl.reward import Sampler, SegmentKind
from tests.tiny import LAYERS


def test_drawn_tokens_follow_the_distribution() -> None:
    prob = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    rules = [TokenRule(9, frozenset(), 1.0, seed) for seed in range(4000)]
    draws = torch.tensor([rule.pick(prob.log(), 0) for rule in rules])
    share = torch.bincount(draws, minlength=4) / 4000
    assert share[1] == 0
    torch.testing.assert_close(share, prob.float(), atol=0.03, rtol=0)
    assert TokenRule(9, frozenset(), 0.0, 0).pick(prob.log(), 0) == 0


def test_a_phase_ends_with_an_end_token_or_at_its_length() -> None:
    rule = TokenRule(3, frozenset({7, 9}))
    assert [rule.ends(tokens) for tokens in ([1], [1, 2], [1, 2, 3], [7], [7, 1], [1, 9])] == [
        False, False, True, True, False, True
    ]  # fmt: skip


def test_a_trace_that_does_not_fit_itself_is_refused() -> None:
    nll, skip = torch.zeros(3, dtype=torch.float64), torch.zeros(LAYERS, 2, dtype=torch.bool)
    good: dict[str, Any] = {"token_ids": (1, 2, 3), "nll_gated_N": nll, "skip_LT": skip}
    SegmentTrace(SegmentKind.SELF, Sampler.GATED, 4, **good, closed_chunks=(0, 0, 1))
    for wrong in ({"token_ids": (1,)}, {"skip_LT": skip[:, :1]}, {"closed_chunks": (0,)}):
        with pytest.raises(ValueError, match="segment"):
            SegmentTrace(SegmentKind.SELF, Sampler.GATED, 4, **{**good, **wrong})
