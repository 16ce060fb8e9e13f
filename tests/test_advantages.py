"""Returns, baselines and GAE against loops written from their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.rl.advantages import (
    AdvantageSettings,
    Baseline,
    Credit,
    Scale,
    SegmentRow,
    compute_advantages,
    generalised_advantages,
    windowed_returns,
)
from fbs_rl.rl.reward import SegmentKind

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)
GOLD, SELF = SegmentKind.GOLD, SegmentKind.SELF


def rewards(length: int, seed: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(lengths: list[int], seed: int = 0, prompt: str = "q") -> list[SegmentRow]:
    """Rows whose R differs from what their shares add up to: the rest lies in another segment."""
    made = [rewards(length, seed + i) for i, length in enumerate(lengths)]
    return [SegmentRow(prompt, SELF, r_T, float(r_T.sum()) + 0.1 * i) for i, r_T in enumerate(made)]


def plain(**options: Any) -> AdvantageSettings:
    return AdvantageSettings(**{"scale": Scale.NONE, **options})


# --- returns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_windowed_returns_equal_a_loop(window: int) -> None:
    reward_RT = torch.stack([rewards(11, seed) for seed in range(4)])
    for row, returns_T in zip(reward_RT, windowed_returns(reward_RT, window), strict=True):
        wanted = [math.fsum(row[t : t + window].tolist()) for t in range(11)]
        assert returns_T.tolist() == pytest.approx(wanted)


def loop_returns(row: SegmentRow, options: AdvantageSettings) -> list[float]:
    length = len(row.reward_T)
    if options.credit is Credit.EPISODE:
        return [row.episode_reward] * length
    reach = options.window_tokens if options.credit is Credit.WINDOW else length
    return [math.fsum(row.reward_T[t : t + reach].tolist()) for t in range(length)]


# --- leave-one-out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", list(Credit))
def test_leave_one_out_advantages_of_a_column_sum_to_zero(credit: Credit) -> None:
    rows = rows_of([7] * 5) + rows_of([4] * 3, seed=50, prompt="other")
    found = compute_advantages(rows, AdvantageSettings(credit=credit)).advantage
    for group in (found[:5], found[5:]):
        stacked = torch.stack(group)
        assert stacked.abs().max() > 0.1
        assert torch.allclose(stacked.sum(0), torch.zeros(stacked.shape[1]).double(), atol=1e-12)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    credit=st.sampled_from(list(Credit)),
    window=st.integers(1, 10),
)
@PROPERTY
def test_leave_one_out_equals_a_loop(lengths: list[int], credit: Credit, window: int) -> None:
    options = plain(credit=credit, window_tokens=window)
    rows = rows_of(lengths)
    found = compute_advantages(rows, options)
    returns = [loop_returns(row, options) for row in rows]
    for i, length in enumerate(lengths):
        others = [j for j in range(len(rows)) if j != i]
        for t in range(length):
            if credit is Credit.EPISODE:
                seen = [rows[j].episode_reward for j in others]
            else:
                seen = [returns[j][t] for j in others if len(returns[j]) > t]
                seen = seen or [g for j in others for g in returns[j]]
            wanted = returns[i][t] - (math.fsum(seen) / len(seen) if seen else 0.0)
            assert float(found.advantage[i][t]) == pytest.approx(wanted, abs=1e-9)
    assert set(found.divisor) == {1.0}


def test_the_baseline_of_a_row_takes_nothing_from_it() -> None:
    """Changing one rollout's rewards moves its own advantages by just that, and no baseline of its own."""
    rows = rows_of([5, 6, 3])
    changed = [SegmentRow("q", SELF, rows[0].reward_T + 2.0, 9.0), *rows[1:]]
    before = compute_advantages(rows, plain(window_tokens=1)).advantage
    after = compute_advantages(changed, plain(window_tokens=1)).advantage
    assert torch.allclose(after[0] - before[0], torch.full((5,), 2.0).double())
    assert torch.allclose(after[1][:3] - before[1][:3], torch.full((3,), -1.0).double())
    assert torch.allclose(after[1][3:5] - before[1][3:5], torch.full((2,), -2.0).double())


def test_segments_and_prompts_are_compared_with_their_like() -> None:
    rows = [
        SegmentRow(prompt, kind, torch.tensor([value]).double(), value)
        for prompt, kind, value in [
            ("a", SELF, 1.0), ("b", SELF, 10.0), ("a", GOLD, 100.0),
            ("a", SELF, 3.0), ("b", SELF, 16.0), ("a", GOLD, 160.0),
        ]
    ]  # fmt: skip
    found = compute_advantages(rows, plain()).advantage
    assert [float(a_T) for a_T in found] == [-2.0, -6.0, -60.0, 2.0, 6.0, 60.0]


# --- other baselines --------------------------------------------------------------------------------


def test_group_baseline_with_the_episode_reward_is_grpo() -> None:
    """(R − mean)/std over the rollouts of a prompt, the same for every column, whatever their lengths."""
    rows = rows_of([4, 2, 5, 0]) + rows_of([3, 3], seed=20, prompt="other")
    options = AdvantageSettings(credit=Credit.EPISODE, baseline=Baseline.GROUP)
    found = compute_advantages(rows, options)
    for group in (range(4), range(4, 6)):
        total = torch.tensor([rows[i].episode_reward for i in group])
        wanted = (total - total.mean()) / total.std(correction=0)
        for i, a in zip(group, wanted.tolist(), strict=True):
            assert found.advantage[i].tolist() == pytest.approx([a] * len(rows[i].reward_T), 1e-5)
            assert found.divisor[i] == pytest.approx(float(total.std(correction=0)), 1e-5)


def test_group_baseline_per_column_by_hand() -> None:
    made = [[1.0, 4.0], [3.0, 0.0], [5.0]]
    rows = [SegmentRow("q", SELF, torch.tensor(r).double(), sum(r)) for r in made]
    found = compute_advantages(
        rows, AdvantageSettings(window_tokens=1, baseline=Baseline.GROUP)
    ).advantage
    std = math.sqrt((4 + 0 + 4 + 4 + 4) / 5)  # about the means 3 and 2 of the two columns
    assert [a_T.tolist() for a_T in found] == [
        pytest.approx([-2 / std, 2 / std]), pytest.approx([0, -2 / std]), pytest.approx([2 / std]),
    ]  # fmt: skip


def test_rollouts_that_agree_have_no_advantage() -> None:
    rows = [SegmentRow("q", SELF, torch.tensor([0.1, 0.7]).double(), 0.8) for _ in range(8)]
    for baseline in (Baseline.GROUP, Baseline.LEAVE_ONE_OUT):
        found = compute_advantages(rows, AdvantageSettings(baseline=baseline)).advantage
        assert torch.stack(found).abs().max() < 1e-12


@pytest.mark.parametrize("credit", list(Credit))
def test_batch_baseline_is_one_number(credit: Credit) -> None:
    options = plain(credit=credit, baseline=Baseline.BATCH, window_tokens=2)
    rows = rows_of([3, 5]) + rows_of([4], seed=9, prompt="alone")
    found = compute_advantages(rows, options).advantage
    returns = [loop_returns(row, options) for row in rows]
    everything = [g for row in returns for g in row]
    if credit is Credit.EPISODE:
        everything = [row.episode_reward for row in rows]
    mean = math.fsum(everything) / len(everything)
    for row, a_T in zip(returns, found, strict=True):
        assert a_T.tolist() == pytest.approx([g - mean for g in row])


def test_scaling_divides_by_the_std_and_leaves_the_mean() -> None:
    rows = rows_of([3, 6, 5])
    raw = torch.cat(compute_advantages(rows, plain()).advantage)
    scaled = compute_advantages(rows, AdvantageSettings())
    std = float(raw.std(correction=0))
    assert torch.allclose(torch.cat(scaled.advantage), raw / std)
    assert scaled.divisor == pytest.approx((std,) * 3)
    assert abs(float(torch.cat(scaled.advantage).mean())) > 1e-3


# --- generalised advantage estimation ---------------------------------------------------------------


def gae_by_definition(
    reward: list[float], value: list[float], bootstrap: float, gamma: float, lam: float
) -> list[float]:
    """Schulman et al. 2016, eqs 11-16, from the k-step estimators: A^(k) and their λ-weighted mean.

    With T − t steps left, the weights of all estimators that would reach beyond the end fall on the last.
    """
    length = len(reward)
    values = [*value, bootstrap]
    found = []
    for t in range(length):
        left = length - t
        estimators = [
            sum(gamma**i * reward[t + i] for i in range(k)) + gamma**k * values[t + k] - values[t]
            for k in range(1, left + 1)
        ]
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, left)] + [lam ** (left - 1)]
        found.append(sum(w * a for w, a in zip(weights, estimators, strict=True)))
    return found


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_weighted_mean_of_k_step_estimators(gamma: float, lam: float) -> None:
    """Rows that ended (bootstrap 0), rows that were cut off, rows of several lengths in one batch."""
    lengths, bootstrap = [6, 1, 4, 0], [0.0, 0.7, -1.3, 0.4]
    reward_RT, value_RT = torch.zeros(2, 4, 6, dtype=torch.float64)
    valid_RT = torch.zeros(4, 6, dtype=torch.bool)
    for row, length in enumerate(lengths):
        reward_RT[row, :length] = rewards(length, row)
        value_RT[row, :length] = rewards(length, row + 10)
        valid_RT[row, :length] = True
    value_RT[~valid_RT] = 1e6  # what is behind a row's end must not matter
    found = generalised_advantages(
        reward_RT, value_RT, valid_RT, torch.tensor(bootstrap).double(), gamma, lam
    )
    for row, length in enumerate(lengths):
        wanted = gae_by_definition(
            reward_RT[row, :length].tolist(),
            value_RT[row, :length].tolist(),
            float(torch.tensor(bootstrap[row])),
            gamma,
            lam,
        )
        assert found[row, :length].tolist() == pytest.approx(wanted)
        assert not found[row, length:].any()


def test_critic_pays_the_episode_reward_at_the_last_column() -> None:
    values = [rewards(4, 1), rewards(2, 2)]
    rows = [
        SegmentRow("q", GOLD, torch.full_like(v_T, 9.0), total, v_T)
        for v_T, total in zip(values, [0.5, -0.2], strict=True)
    ]
    found = compute_advantages(rows, plain(credit=Credit.EPISODE, baseline=Baseline.CRITIC))
    for row, a_T, target_T in zip(rows, found.advantage, found.value_target, strict=True):
        assert row.value_T is not None
        reward = [0.0] * (len(a_T) - 1) + [row.episode_reward]
        wanted = gae_by_definition(reward, row.value_T.tolist(), 0.0, 1.0, 0.95)
        assert a_T.tolist() == pytest.approx(wanted)
        assert torch.allclose(target_T, a_T + row.value_T)


def test_critic_with_shares_bootstraps_rows_that_were_cut_off() -> None:
    row = SegmentRow("q", SELF, rewards(5, 3), 0.0, rewards(5, 4), bootstrap=0.8)
    ended = SegmentRow("q", SELF, row.reward_T, 0.0, row.value_T)
    options = plain(credit=Credit.TO_GO, baseline=Baseline.CRITIC, gamma=0.9)
    cut_T, ended_T = compute_advantages([row, ended], options).advantage
    assert row.value_T is not None
    reward, value = row.reward_T.tolist(), row.value_T.tolist()
    assert cut_T.tolist() == pytest.approx(gae_by_definition(reward, value, 0.8, 0.9, 0.95))
    assert ended_T.tolist() == pytest.approx(gae_by_definition(reward, value, 0.0, 0.9, 0.95))


def test_value_targets_are_on_the_scale_of_rewards() -> None:
    rows = [SegmentRow("q", SELF, rewards(5, 3) * 0.01, 0.0, torch.zeros(5).double())] * 2
    options = AdvantageSettings(credit=Credit.TO_GO, baseline=Baseline.CRITIC, gae_lambda=1.0)
    found = compute_advantages(rows, options)
    to_go = [math.fsum(rows[0].reward_T[t:].tolist()) for t in range(5)]
    assert found.value_target[0].tolist() == pytest.approx(to_go)
    assert torch.cat(found.advantage).std(correction=0) == pytest.approx(1.0)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window_tokens": 0}, "window_tokens is 0"),
        ({"gae_lambda": 1.2}, "gae_lambda is 1.2"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"baseline": Baseline.CRITIC}, "takes no window"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdvantageSettings(**options)


def test_baselines_without_something_to_stand_on() -> None:
    with pytest.raises(ValueError, match="prompt 'q' has one self segment"):
        compute_advantages(rows_of([3]), AdvantageSettings())
    with pytest.raises(ValueError, match="give value_T"):
        compute_advantages(rows_of([3, 2]), plain(credit=Credit.TO_GO, baseline=Baseline.CRITIC))
    with pytest.raises(ValueError, match="no rows"):
        compute_advantages([], AdvantageSettings())
    with pytest.raises(ValueError, match="3 columns and values of shape"):
        SegmentRow("q", SELF, torch.zeros(3), 0.0, torch.zeros(2))
