"""What the gated model writes by itself, in figures: against sums over its tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fbs_rl.rl.own_text import OwnText, own_ratios
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import RolloutSettings
from tests.test_policy_study import tasks
from tests.tiny import lively


def test_own_text_is_counted_by_the_token() -> None:
    model, asked = lively(), tasks()
    settings = RolloutSettings(Sampler.GATED, 7, 1.0, None, 0.5, end_ids=tuple(range(0, 97, 6)))
    episodes = ParallelRollouts(model, 200).roll(asked, settings)
    own = [episode.segments[0] for episode in episodes]
    found = OwnText.of(episodes)
    tokens = sum(len(segment.token_ids) for segment in own)
    assert tokens < 42  # some have ended
    gated = sum(float(segment.nll_gated_N.sum()) for segment in own) / tokens
    dense = sum(float(segment.nll_dense_N.sum()) for segment in own) / tokens
    skips = np.concatenate([segment.trace.skip_TL for segment in own])
    assert found.record() == pytest.approx({
        "nll_gated": gated, "nll_dense": dense, "reverse_kl": dense - gated, "skip": skips.mean(),
        "tokens": tokens / 6, "questions": 6,
    })  # fmt: skip
    assert skips.mean() > 0.1 and dense > gated
    unskipped = ParallelRollouts(model, 200).roll(asked, replace(settings, tau=1.0))
    difference = found.minus(OwnText.of(unskipped))["reverse_kl"]
    assert difference[0] == pytest.approx(dense - gated, abs=1e-5)
    assert difference[1] < difference[0] < difference[2]


def test_own_text_is_measured_near_20_percent_and_at_the_most() -> None:
    assert own_ratios((0.05, 0.18, 0.3, 0.36)) == [0.18, 0.36]
    assert own_ratios((0.1, 0.2)) == [0.2]
