"""Schedules against the formulas of SPEC 2.2, 4.7 and 5, worked out by hand."""

from __future__ import annotations

import math

import pytest

from fbs_rl.training.schedule import Phase, StepPlan, lr_scale, plan_step
from fbs_rl.training.settings import OptimizerSettings, PhaseSettings
from fbs_rl.types import GateMode

ADAMW = OptimizerSettings(warmup_frac=0.1, lr_final_frac=0.2)


def plans(**phases: object) -> list[StepPlan]:
    settings = PhaseSettings(**{"steps": 10, **phases})  # pyright: ignore[reportArgumentType]
    return [plan_step(step, settings, ADAMW) for step in range(settings.steps)]


def test_the_first_share_of_the_steps_is_observed() -> None:
    made = plans(observe_frac=0.4, train="new", train_gated="gates", gates="threshold")
    assert [p.phase for p in made] == [Phase.OBSERVE] * 4 + [Phase.GATED] * 6
    assert [p.mode for p in made] == [GateMode.DENSE] * 4 + [GateMode.THRESHOLD] * 6
    assert [p.trains for p in made] == ["new"] * 4 + ["gates"] * 6
    assert [p.step for p in made] == list(range(10))


@pytest.mark.parametrize(
    ("frac", "observed"), [(0.0, 0), (0.04, 0), (0.06, 1), (0.99, 10), (1.0, 10)]
)
def test_either_phase_may_be_empty(frac: float, observed: int) -> None:
    made = plans(observe_frac=frac)
    assert [p.phase for p in made].count(Phase.OBSERVE) == observed
    assert made[0].skip_target == pytest.approx(0.05 if observed else 0.05 + 0.31 * 0.2)


def test_the_target_is_the_first_one_while_observing_and_then_rises() -> None:
    """ρ* = 0.05 in 1a; in 1b it rises over half of its ten steps: 0.05 + 0.31·j/5."""
    made = plans(steps=20, observe_frac=0.5, skip_ramp_frac=0.5)
    wanted = [0.05] * 10 + [0.112, 0.174, 0.236, 0.298, 0.36] + [0.36] * 5
    assert [p.skip_target for p in made] == pytest.approx(wanted)


def test_without_a_ramp_the_target_is_reached_at_once() -> None:
    made = plans(observe_frac=0.5, skip_ramp_frac=0.0)
    assert [p.skip_target for p in made] == pytest.approx([0.05] * 5 + [0.36] * 5)


def test_tau_falls_along_phase_1b() -> None:
    """0.9 → 0.8 over the five steps of 1b, at the end on the last."""
    made = plans(observe_frac=0.5)
    assert [p.tau for p in made] == pytest.approx([0.9] * 5 + [0.88, 0.86, 0.84, 0.82, 0.8])


def test_gate_temperature_falls_along_phase_1b() -> None:
    made = plans(observe_frac=0.5)
    assert [p.gate_temperature for p in made] == pytest.approx(
        [1] * 5 + [0.85, 0.7, 0.55, 0.4, 0.25]
    )


def test_window_temperature_falls_along_the_whole_run() -> None:
    for frac in (0.0, 0.5, 1.0):
        found = [p.window_temperature for p in plans(observe_frac=frac)]
        assert found == pytest.approx([1 - 0.075 * (step + 1) for step in range(10)])
        assert found[-1] == pytest.approx(0.25)


def test_the_preview_loss_is_warmed_up() -> None:
    made = plans(steps=100, preview_warmup_frac=0.04)
    assert [p.preview_scale for p in made[:6]] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert plans(preview_warmup_frac=0.0)[0].preview_scale == 1


def test_ctc_waits() -> None:
    assert [p.force_cross_entropy for p in plans(cross_entropy_steps=3)] == [True] * 3 + [False] * 7
    assert not any(p.force_cross_entropy for p in plans(cross_entropy_steps=0))


def test_one_step_is_the_end_of_every_ramp() -> None:
    (only,) = plans(steps=1, observe_frac=0.0)
    assert (only.tau, only.gate_temperature, only.window_temperature) == pytest.approx(
        (0.8, 0.25, 0.25)
    )
    assert only.skip_target == pytest.approx(0.36) and only.phase is Phase.GATED
    (only,) = plans(steps=1, observe_frac=1.0)
    assert (only.tau, only.skip_target, only.phase) == (0.9, 0.05, Phase.OBSERVE)


def test_plans_carry_the_rate_of_the_whole_run() -> None:
    """Phase 1b goes on along the same curve; it does not warm up again."""
    for frac in (0.0, 0.3):
        made = plans(observe_frac=frac)
        assert [p.lr_scale for p in made] == [lr_scale(step, 10, ADAMW) for step in range(10)]


# --- learning rate ----------------------------------------------------------------------------------


def test_the_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    """Warm-up 240 of 6,000 steps: (s+1)/240; then 0.1 + 0.9·(1 + cos π·(s−240)/(5,999−240))/2."""
    adamw = OptimizerSettings(warmup_frac=0.04, lr_final_frac=0.1)
    assert lr_scale(0, 6000, adamw) == pytest.approx(1 / 240)
    assert lr_scale(119, 6000, adamw) == pytest.approx(0.5)
    assert lr_scale(239, 6000, adamw) == lr_scale(240, 6000, adamw) == 1
    assert lr_scale(5999, 6000, adamw) == pytest.approx(0.1)
    for step in (500, 3119, 5000):
        angle = math.pi * (step - 240) / 5759
        assert lr_scale(step, 6000, adamw) == pytest.approx(0.55 + 0.45 * math.cos(angle))
    scales = [lr_scale(step, 6000, adamw) for step in range(6000)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[:240] == sorted(scales[:240]) and scales[240:] == sorted(
        scales[240:], reverse=True
    )


def test_warm_up_is_the_share_that_was_asked_for() -> None:
    """0.07·100 is a little above 7 in floating point; the warm-up is 7 steps, not 8."""
    adamw = OptimizerSettings(warmup_frac=0.07)
    assert lr_scale(6, 100, adamw) == 1 and lr_scale(5, 100, adamw) == pytest.approx(6 / 7)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.04, 0.5, 1.0])
def test_short_runs_have_a_rate_at_every_step(total: int, warmup: float) -> None:
    adamw = OptimizerSettings(warmup_frac=warmup, lr_final_frac=0.1)
    scales = [lr_scale(step, total, adamw) for step in range(total)]
    assert all(0 < scale <= 1 for scale in scales) and max(scales) == 1
    if warmup == 0 and total > 1:
        assert scales[0] == 1 and scales[-1] == pytest.approx(0.1)
    if warmup == 1:
        assert scales == pytest.approx([(step + 1) / total for step in range(total)])


def test_the_rate_may_stay_or_fall_to_nothing() -> None:
    flat = OptimizerSettings(warmup_frac=0.0, lr_final_frac=1.0)
    assert [lr_scale(step, 5, flat) for step in range(5)] == [1] * 5
    gone = OptimizerSettings(warmup_frac=0.0, lr_final_frac=0.0)
    assert lr_scale(4, 5, gone) == pytest.approx(0.0)


def test_the_last_share_of_phase_1b_may_be_hardened() -> None:
    """Of ten steps of 1b the last three: p >= 1/2 skips, and the surrogate is p itself."""
    made = plans(steps=14, observe_frac=4 / 14, harden_frac=0.3)
    modes = [GateMode.DENSE] * 4 + [GateMode.SAMPLE] * 7 + [GateMode.THRESHOLD] * 3
    assert [p.mode for p in made] == modes
    assert {(p.tau, p.gate_temperature) for p in made[-3:]} == {(0.5, 1.0)}
    assert all(p.tau != 0.5 for p in made[:-3])
