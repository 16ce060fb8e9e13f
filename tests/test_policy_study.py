"""The study of skip policies: its figures against the reward's own code, its curves, its tables."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.config import from_tree
from fbs_rl.rl.credit import score_episode
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.heldout_points import FIGURES, Heldout, Point, measure_point, own_dense, skip_of
from fbs_rl.rl.paired_bootstrap import paired_difference, paired_ratio_difference
from fbs_rl.rl.parallel_pass import drawn_gates, threshold_gates
from fbs_rl.rl.parallel_rollouts import ParallelRollouts
from fbs_rl.rl.policy_trial import keep, restore
from fbs_rl.rl.reward import RewardSettings, Sampler, SegmentKind
from fbs_rl.rl.rollout import RolloutSettings, RolloutTask
from fbs_rl.rl.skip_curves import Bench, at_skip
from fbs_rl.rl.study_table import study_tables
from tests.tiny import LAYERS, NOOP, VOCAB, enliven, fresh, lively

POLICY = GatePolicy(low=0.1, high=0.9)
REWARD = RewardSettings(beta=0.3, lam=0.2)


def tasks(count: int = 6) -> list[RolloutTask]:
    """Of uneven length; the answer of the first has a single token, so its gold segment has no column."""
    draw = torch.Generator().manual_seed(8)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())

    return [RolloutTask(f"q{i}", ids(3 + i % 4), ids(1 + i % 5), (70 * i,)) for i in range(count)]


def heldout(rollouts: ParallelRollouts, samples: int = 1, tokens: int = 7) -> Heldout:
    settings = RolloutSettings(Sampler.DENSE, tokens)
    texts = rollouts.texts(tasks(), settings)
    return Heldout.of(rollouts.model, texts, [t.seeds[0] for t in tasks()], samples, 200)


# --- one point ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NOOP])
@pytest.mark.parametrize(
    "tree",
    [
        {"beta": 0.3, "lam": 0.2},
        {"beta": 0.3, "lam": 0.2, "quality": "gold", "nll_floor": -0.01, "nll_ceiling": 0.1},
        {"beta": 0.3, "lam": 0.2, "only_increase": True},
    ],
)
def test_figures_of_questions_are_those_of_their_episodes(
    options: dict[str, Any], tree: dict[str, Any]
) -> None:
    model = enliven(fresh(**options))
    rollouts, reward = ParallelRollouts(model, 200), from_tree(RewardSettings, tree)
    drawn = heldout(rollouts, samples=3)
    found = measure_point(model, drawn, drawn_gates(model.config, POLICY, drawn.seeds), reward, 0.1)
    more = [replace(t, seeds=tuple(t.seeds[0] + i for i in range(3))) for t in tasks()]
    episodes = rollouts.roll(more, RolloutSettings(Sampler.DENSE, 7, policy=POLICY))
    scored = [score_episode(episode, model.config, reward) for episode in episodes]
    for question in range(6):
        mine = scored[3 * question : 3 * question + 3]
        wanted = {
            "reward": [s.reward.total for s in mine],
            "compute_term": [s.reward.compute_term for s in mine],
            "quality_term": [s.reward.quality_term for s in mine],
            "flops": [s.flops for s in mine],
            "dense_flops": [s.dense_flops for s in mine],
        }
        for kind, name in ((SegmentKind.GOLD, "dnll_gold"), (SegmentKind.SELF, "dnll_self")):
            segments = [x for s in mine for x in s.episode.segments if x.kind is kind]
            wanted[name] = [float((x.nll_gated_N - x.nll_dense_N).mean()) for x in segments]
        skips = [np.concatenate([x.trace.skip_TL for x in s.episode.segments]) for s in mine]
        wanted["skipped"], wanted["places"] = [s.sum() for s in skips], [s.size for s in skips]
        assert set(wanted) == set(FIGURES)
        for name, values in wanted.items():
            np.testing.assert_allclose(
                found.of(name)[question], np.mean(values), rtol=1e-5, atol=1e-6, err_msg=name
            )
    assert 0.1 < found.skip < 0.8
    np.testing.assert_allclose(np.mean(found.rate_L), found.skip, rtol=1e-6)


def test_a_question_without_a_column_is_paid_nothing() -> None:
    rollouts = ParallelRollouts(lively(), 200)
    gold = heldout(rollouts, tokens=0)
    found = measure_point(lively(), gold, threshold_gates(0.0), REWARD, 1.0)
    assert found.of("places")[0] == 0 == found.of("reward")[0] and found.of("reward")[1] != 0


def test_a_moved_dense_pass_moves_rewards_and_not_the_increase() -> None:
    model = copy.deepcopy(lively())
    rollouts = ParallelRollouts(model, 200)
    scoring = heldout(rollouts)
    assert torch.equal(own_dense(model, scoring), scoring.start_nll_RN)
    model.lm_head.weight.data *= 1.3
    gates = threshold_gates(2.0)
    moved = measure_point(model, scoring, gates, REWARD, 0.0, None, own_dense(model, scoring))
    np.testing.assert_allclose(moved.of("quality_term"), 0, atol=1e-9)
    assert np.abs(moved.of("dnll_gold")).min() > 1e-3


def test_restoring_the_start_undoes_all() -> None:
    model = copy.deepcopy(lively())
    scoring, kept = heldout(ParallelRollouts(model, 200)), keep(model)
    before = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".skip_gate." in name or ".paw." in name:
                parameter.add_(0.3)
    other = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    restore(model, kept)
    again = measure_point(model, scoring, threshold_gates(0.5), REWARD, 0.1)
    assert np.array_equal(again.figures_FQ, before.figures_FQ)
    assert not np.array_equal(other.figures_FQ, before.figures_FQ)


# --- curves ---------------------------------------------------------------------------------------------


def make_bench() -> Bench:
    rollouts = ParallelRollouts(lively(), 200)
    half = heldout(rollouts)
    return Bench(lively(), half, half, heldout(rollouts, samples=4), (0.1, 0.3))


def test_curves_reach_the_ratios_that_are_asked_for() -> None:
    bench = make_bench()
    places = LAYERS * int(bench.tuning.questions)
    thresholds = bench.thresholds(REWARD, moved=False)
    drawn = bench.draws(POLICY, REWARD, moved=False)
    random = bench.random(REWARD, 0)
    for curve in (thresholds, drawn, random):
        assert curve[0].skip == 0 and [p.asked for p in curve] == [0.0, 0.1, 0.3, bench.asked[-1]]
        assert [p.skip for p in curve[1:]] == pytest.approx(bench.asked, abs=0.06 + 2 / places)
    # Knobs are set on these very questions, so what is found there is what is measured.
    for point in thresholds[1:]:
        assert point.parameter is not None
        assert skip_of(bench.model, bench.scoring, threshold_gates(point.parameter)) == point.skip
    assert thresholds[0].of("dnll_gold") == pytest.approx(np.zeros(6), abs=1e-6)
    assert thresholds[0].of("reward").max() <= 0  # gates cost, and nothing is skipped
    assert random[0].of("reward") == pytest.approx(np.zeros(6), abs=1e-7)


def test_static_drops_the_least_harmful_layers_first() -> None:
    bench = make_bench()
    order, config = bench.drop_order(), bench.model.config
    assert sorted(order) == [i for i in range(LAYERS) if i not in config.protected_layers]
    curve = bench.static(REWARD)
    assert len(curve) == 1 + 3  # ceil(0.36 · 8) layers
    for count, point in enumerate(curve):
        assert {i for i, rate in enumerate(point.rate_L) if rate == 1} == set(order[:count])
        assert sum(point.rate_L) == count and point.skip == pytest.approx(count / LAYERS)


def made_point(skip: float, gold: float) -> Point:
    figures = np.zeros((len(FIGURES), 2))
    figures[FIGURES.index("places")] = 10
    figures[FIGURES.index("skipped")] = 10 * skip
    figures[FIGURES.index("dnll_gold")] = gold, 3 * gold
    return Point(skip, None, (skip, skip), figures)


def test_equal_skip_lies_on_the_line_between_neighbours() -> None:
    curve = (made_point(0.0, 0.0), made_point(0.4, 0.8), made_point(0.2, 0.1))
    found = at_skip(curve, 0.25)
    assert found is not None and found.skip == pytest.approx(0.25)
    assert found.of("dnll_gold") == pytest.approx([0.275, 0.825])
    exact = at_skip(curve, 0.4)
    assert exact is not None and exact.of("dnll_gold") == pytest.approx([0.8, 2.4])
    assert at_skip(curve, 0.41) is None and at_skip(curve[1:], 0.1) is None


def test_paired_differences_forget_what_questions_have_in_common() -> None:
    draw = np.random.default_rng(0)
    level_Q = draw.normal(0, 10, 400)
    noise_Q = draw.normal(0.5, 1, 400)
    mean, low, high = paired_difference(level_Q + noise_Q, level_Q)
    assert mean == pytest.approx(noise_Q.mean())
    half = 1.96 * noise_Q.std() / 20  # the normal approximation of the same interval
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_differences_of_ratios_weigh_questions_by_their_tokens() -> None:
    one = np.array([2.0, 9.0]), np.array([1.0, 9.0])
    other = np.array([1.0, 0.0]), np.array([2.0, 2.0])
    mean, low, high = paired_ratio_difference(one, other)
    assert mean == pytest.approx(11 / 10 - 1 / 4)
    # Resamples of two questions: either twice (2 − 1/2, 1 − 0), or each once.
    assert (low, high) == pytest.approx((0.85, 1.5))
    assert paired_ratio_difference(one, one) == (0, 0, 0)


# --- the table --------------------------------------------------------------------------------------------


def equal(seed: int, arm: str, gold: float, difference: float | None) -> dict[str, Any]:
    minus = None if difference is None else dict.fromkeys(
        ("dnll_gold", "dnll_self", "reward"), (difference, difference - 0.01, difference + 0.01)
    )  # fmt: skip
    return {
        "kind": "equal", "config": "c", "seed": seed, "step": 4, "arm": arm, "asked": 0.2, "flops_frac": 0.9,
        "dnll_gold": gold, "dnll_self": 0.0, "reward": 0.01, "minus_no_rl": minus,
    }  # fmt: skip


def test_the_table_has_means_ranges_and_the_widest_interval() -> None:
    rows = [equal(seed, "no-RL", 0.1, None) for seed in (0, 1)]
    rows += [equal(0, "PPO", 0.5, 9.0), equal(0, "PPO", 0.06, -0.04), equal(1, "PPO", 0.08, -0.02)]
    stop = {"kind": "stopped", "config": "c", "seed": 1, "step": 3, "reason": "gates collapsed"}
    table = study_tables([*rows, stop])
    line = next(row for row in table.splitlines() if row.startswith("| 20% | PPO |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3] == "2" and cells[5] == "+0.0700 (0.0600 to 0.0800)"
    assert cells[8] == "-0.0300 [-0.0500, -0.0100]"
    reference = next(row for row in table.splitlines() if row.startswith("| 20% | no-RL |"))
    assert reference.endswith("|  |  |")
    assert "c, seed 1: stopped after 3 updates: gates collapsed" in table
    assert "that the gated model writes" not in table


def test_the_table_of_own_text() -> None:
    def own(seed: int, arm: str, kl: float, minus: Any) -> dict[str, Any]:
        return {
            "kind": "own", "config": "c", "seed": seed, "step": 0, "arm": arm, "asked": 0.2, "skip": 0.21,
            "tokens": 40.0, "nll_gated": 1.0, "nll_dense": 1.0 + kl, "reverse_kl": kl, "minus_no_rl": minus,
        }  # fmt: skip

    rows = [own(seed, "no-RL", 0.3, None) for seed in (0, 1)]
    rows += [own(0, "PPO", 0.1, {"reverse_kl": (-0.2, -0.3, -0.1)})]
    rows += [own(1, "PPO", 0.2, {"reverse_kl": (-0.1, -0.2, 0.05)})]
    table = study_tables(rows)
    line = next(row for row in table.splitlines() if row.startswith("| 20% | PPO |"))
    assert [cell.strip() for cell in line.split("|")][3:-1] == [
        "2", "0.2100 (0.2100 to 0.2100)", "40.0 (40.0 to 40.0)", "1.0000 (1.0000 to 1.0000)",
        "1.1500 (1.1000 to 1.2000)", "+0.1500 (0.1000 to 0.2000)", "-0.1500 [-0.3000, +0.0500]",
    ]  # fmt: skip
