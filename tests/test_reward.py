"""The reward and its shares against SPEC 8.2's arithmetic, loops and sums by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)
GOLD, SELF = SegmentKind.GOLD, SegmentKind.SELF


def outcome(
    kind: SegmentKind,
    flops: list[int],
    dense: list[int],
    gated: list[float],
    plain: list[float],
    sampled_by: Sampler | None = None,
) -> SegmentOutcome:
    whose = sampled_by or (Sampler.GIVEN if kind is GOLD else Sampler.DENSE)
    return SegmentOutcome(
        kind,
        torch.tensor(flops, dtype=torch.int64),
        torch.tensor(dense, dtype=torch.int64),
        torch.tensor(gated, dtype=torch.float64),
        torch.tensor(plain, dtype=torch.float64),
        whose,
    )


def random_segment(kind: SegmentKind, columns: int, whose: Sampler, seed: int) -> SegmentOutcome:
    generator = torch.Generator().manual_seed(seed)
    nll = torch.rand(2, columns + 1, generator=generator, dtype=torch.float64) * 12
    dense = torch.randint(10**9, 9 * 10**9, (columns,), generator=generator)
    flops = (dense * torch.rand(columns, generator=generator).double() * 1.1).long()
    return SegmentOutcome(kind, flops, dense, nll[0], nll[1], whose)


def total(shares: tuple[Tensor, ...]) -> float:
    return math.fsum(x for share_T in shares for x in share_T.tolist())


# --- Table 21 (SPEC 8.2) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tflops", "reward"), [(95, 0.005), (84, 0.016), (76, 0.024), (70, 0.030), (68, 0.032)]
)
def test_saved_compute_earns_what_table_21_prints(tflops: int, reward: float) -> None:
    """β = 0.1 and C/C_full = TFLOPs(rel)."""
    gold = outcome(GOLD, [tflops, tflops], [100, 100], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    found = episode_reward([gold], RewardSettings())
    assert found.compute_saved_frac == pytest.approx(1 - tflops / 100)
    assert round(found.compute_term, 3) == reward
    assert found.quality_term == 0.0 and found.total == found.compute_term


def test_a_hundredth_of_nll_costs_what_table_21_prints() -> None:
    """λ = 0.1: a penalty of .001 for .01."""
    gold = outcome(GOLD, [70, 70], [100, 100], [1.0, 2.01, 3.02], [1.0, 2.0, 3.0])
    found = episode_reward([gold], RewardSettings())
    assert found.nll_increase == pytest.approx(0.01)
    assert found.quality_term == pytest.approx(-0.001)
    assert found.total == pytest.approx(0.029)


# --- shares -----------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """Two segments, unequal columns, a token 0 that differs between the passes."""
    own = outcome(SELF, [60, 100, 50], [100, 100, 100], [0.5, 1.0, 2.0, 9.0], [0.4, 1.0, 1.5, 1.0])
    gold = outcome(GOLD, [100], [200], [3.0, 1.0], [3.0, 4.0])
    found = episode_reward([own, gold], RewardSettings(beta=0.5, lam=0.6))
    # C_full = 500, C = 310; six scored tokens; penalties 0.1, 0, 0.5, 5 (ceiling) and 0, −1 (floor).
    assert found.compute_saved_frac == pytest.approx(190 / 500)
    assert found.nll_increase == pytest.approx(4.6 / 6)
    assert found.compute_shares[0].tolist() == pytest.approx([0.04, 0.0, 0.05])
    assert found.compute_shares[1].tolist() == pytest.approx([0.1])
    assert found.quality_shares[0].tolist() == pytest.approx([-0.01, -0.05, -0.5])
    assert found.quality_shares[1].tolist() == pytest.approx([0.1])
    assert found.shares[0].tolist() == pytest.approx([0.03, -0.05, -0.45])
    assert found.total == pytest.approx(0.19 - 0.46)


def test_gold_quality_leaves_the_self_segment_the_compute_bonus_alone() -> None:
    own = outcome(SELF, [60, 60], [100, 100], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0])
    gold = outcome(GOLD, [100], [100], [1.0, 2.0], [1.0, 1.5])
    found = episode_reward([own, gold], RewardSettings(quality=QualityTokens.GOLD))
    assert found.nll_increase == pytest.approx(0.25)
    assert found.quality_shares[0].tolist() == [0.0, 0.0]
    assert found.shares[0].gt(0).all()


@given(
    own=st.integers(0, 9),
    gold=st.integers(0, 5),
    whose=st.sampled_from([Sampler.GATED, Sampler.DENSE]),
    quality=st.sampled_from(list(QualityTokens)),
    only_increase=st.booleans(),
    seed=st.integers(0, 10**6),
)
@PROPERTY
def test_shares_add_up_to_the_reward(
    own: int, gold: int, whose: Sampler, quality: QualityTokens, only_increase: bool, seed: int
) -> None:
    segments = [
        random_segment(SELF, own, whose, seed),
        random_segment(GOLD, gold, Sampler.GIVEN, seed + 1),
    ]
    found = episode_reward(segments, RewardSettings(quality=quality, only_increase=only_increase))
    assert [len(share_T) for share_T in found.shares] == [own, gold]
    assert total(found.shares) == pytest.approx(found.total, abs=1e-14)
    assert total(found.compute_shares) == pytest.approx(found.compute_term, abs=1e-14)
    assert total(found.quality_shares) == pytest.approx(found.quality_term, abs=1e-14)
    assert found.total == found.compute_term + found.quality_term
    if own + gold == 0:
        assert found.total == 0.0
    else:
        assert found.nll_increase == pytest.approx(loop_penalty(segments, quality, only_increase))


def loop_penalty(
    segments: list[SegmentOutcome], quality: QualityTokens, only_increase: bool
) -> float:
    found = []
    for segment in segments:
        if segment.kind is GOLD or quality is QualityTokens.GOLD_AND_SELF:
            for gated, dense in zip(segment.nll_gated_N, segment.nll_dense_N, strict=True):
                log_gated, log_dense = -float(gated), -float(dense)
                sampled, other = log_dense, log_gated  # by the sampler, and by the other pass
                if segment.sampled_by is Sampler.GATED:
                    sampled, other = log_gated, log_dense
                penalty = min(max(sampled - other, -1.0), 5.0)
                found.append(max(penalty, 0.0) if only_increase else penalty)
    return sum(found) / len(found)


def test_a_segment_without_columns_gives_its_token_to_the_first_column() -> None:
    own = outcome(SELF, [50], [100], [1.0, 1.0], [1.0, 1.0])
    gold = outcome(GOLD, [], [], [2.0], [1.0])
    found = episode_reward([gold, own], RewardSettings(lam=0.3))
    assert [share_T.tolist() for share_T in found.quality_shares] == [[], pytest.approx([-0.1])]


def test_an_episode_without_columns_is_worth_nothing() -> None:
    gold = outcome(GOLD, [], [], [2.0], [1.0])
    found = episode_reward([gold], RewardSettings())
    empty = found.shares[0]
    assert found.total == found.nll_increase == 0.0 and empty.tolist() == []


# --- whose tokens they are --------------------------------------------------------------------------


@pytest.mark.parametrize(("whose", "sign"), [(Sampler.DENSE, 1.0), (Sampler.GATED, -1.0)])
def test_the_penalty_of_sampled_tokens_is_a_divergence(whose: Sampler, sign: float) -> None:
    """Averaged over what the sampler draws, exactly: KL of the sampler to the other, so above 0."""
    generator = torch.Generator().manual_seed(3)
    gated, dense = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    wide = RewardSettings(nll_floor=-50.0, nll_ceiling=50.0)
    segment = SegmentOutcome(
        SELF, torch.ones(6).long(), torch.ones(6).long(), -gated, -dense, whose
    )
    drawn, other = (dense, gated) if whose is Sampler.DENSE else (gated, dense)
    mean = float((drawn.exp() * segment.penalty(wide)).sum())
    divergence = float(torch.nn.functional.kl_div(other, drawn, log_target=True, reduction="sum"))
    assert mean == pytest.approx(divergence) and divergence > 0.1
    assert torch.equal(segment.penalty(wide), sign * (dense - gated))


def test_floor_and_ceiling_bound_the_penalty_whoever_sampled() -> None:
    nll = [0.0, 30.0], [30.0, 0.0]
    given = outcome(GOLD, [1], [1], *nll).penalty(RewardSettings())
    dense = outcome(SELF, [1], [1], *nll, Sampler.DENSE).penalty(RewardSettings())
    gated = outcome(SELF, [1], [1], *nll, Sampler.GATED).penalty(RewardSettings())
    assert given.tolist() == dense.tolist() == [-1.0, 5.0]
    assert gated.tolist() == [5.0, -1.0]
    only = RewardSettings(only_increase=True)
    assert outcome(SELF, [1], [1], *nll, Sampler.GATED).penalty(only).tolist() == [5.0, 0.0]


# --- analytic compute -------------------------------------------------------------------------------


def test_skip_gain_is_what_one_more_skip_adds() -> None:
    dense, saved = [100, 200], [[30, 60], [10, 20]]  # by layer and column

    def reward(skips: list[list[int]]) -> EpisodeReward:
        flops = [dense[t] - sum(saved[i][t] * skips[i][t] for i in range(2)) for t in range(2)]
        nothing = [0.0] * 3
        return episode_reward([outcome(GOLD, flops, dense, nothing, nothing)], RewardSettings())

    gain_LT = skip_gain(torch.tensor(saved), 300, RewardSettings())
    none = reward([[0, 0], [0, 0]]).total
    for layer, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        skips = [[0, 0], [0, 0]]
        skips[layer][column] = 1
        assert reward(skips).total - none == pytest.approx(float(gain_LT[layer, column]))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta": -0.1}, "beta is -0.1"),
        ({"lam": math.nan}, "lam is nan"),
        ({"beta": 0.0, "lam": 0.0}, "both 0"),
        ({"nll_floor": 1.0}, "the range must hold 0"),
        ({"nll_ceiling": -1.0}, "the range must hold 0"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RewardSettings(**options)


def test_segments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="FLOPs \\[T\\] and NLLs \\[T \\+ 1\\]"):
        outcome(GOLD, [1, 1], [1, 1], [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="cannot be sampled by given"):
        outcome(SELF, [1], [1], [0.0, 0.0], [0.0, 0.0], Sampler.GIVEN)
    with pytest.raises(ValueError, match="cannot be sampled by gated"):
        outcome(GOLD, [1], [1], [0.0, 0.0], [0.0, 0.0], Sampler.GATED)
    with pytest.raises(ValueError, match="not above 0"):
        outcome(GOLD, [0], [0], [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="not finite"):
        bad = outcome(GOLD, [1], [1], [0.0, math.nan], [0.0, 0.0])
        episode_reward([bad], RewardSettings())


def test_nothing_to_score_is_refused() -> None:
    own = outcome(SELF, [1], [2], [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="give a gold segment"):
        episode_reward([own], RewardSettings(quality=QualityTokens.GOLD))
    with pytest.raises(ValueError, match="segments: none"):
        episode_reward([], RewardSettings())
