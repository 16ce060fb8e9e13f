"""The figures of a step do not depend on how it was cut into calls."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.data.shards import PackedRows
from fbs_rl.training.batches import MicroBatch, to_micro_batch
from fbs_rl.training.schedule import StepPlan, plan_step
from fbs_rl.training.settings import OptimizerSettings, PhaseSettings
from fbs_rl.training.step_report import StepSums
from fbs_rl.types import GateMode, LossCounts, LossScope
from tests.tiny import LAYERS, VOCAB, lively

CPU = torch.device("cpu")
T = 18
OPTIONS: dict[str, Any] = {"loss_gate": 3.0, "loss_gate_entropy": 0.2, "loss_window": 2.0}


def batches(size: int, gated: bool = True) -> list[MicroBatch]:
    """Six rows, some with several documents or padding, in calls of `size` rows."""
    draw = np.random.default_rng(1)
    document_BT = np.zeros((6, T), np.int32)
    document_BT[1, 8:] = 1
    document_BT[2, 12:] = -1
    label_BT = draw.integers(0, 4, (6, T))
    label_BT[document_BT < 0] = -100
    packed = PackedRows(
        draw.integers(0, VOCAB, (6, T)), document_BT, label_BT,
        np.array([1, 0.9, 1, 0.5, np.nan, 1], np.float32), np.ones(6, np.float32),
    )  # fmt: skip
    made = []
    for first in range(0, 6, size):
        part = slice(first, first + size)
        cut = PackedRows(*(getattr(packed, f.name)[part] for f in dataclasses.fields(packed)))
        starts = [2 + row if gated else T for row in range(6)][part]
        made.append(to_micro_batch(cut, starts, list(range(6))[part], torch.ones(4), CPU))
    return made


def plan_of(mode: str, step: int) -> StepPlan:
    phases = PhaseSettings(steps=10, observe_frac=1.0 if mode == "dense" else 0.0)
    plan = plan_step(step, phases, OptimizerSettings())
    return dataclasses.replace(plan, mode=GateMode(mode), tau=0.5, preview_scale=0.5)


def call(model: Any, batch: MicroBatch, plan: StepPlan, scope: LossScope | None) -> Any:
    batch.chunk_labels.force_cross_entropy = True
    with torch.no_grad():
        return model(
            batch.ids_BT, batch.valid_BT, labels=batch.labels_BT, gates=plan.mode, tau=plan.tau,
            decode_start=batch.decode_start_B, gate_seed=batch.gate_seed_B, gate_temperature=plan.gate_temperature,
            window_temperature=plan.window_temperature, document_ids=batch.document_BT,
            chunk_labels=batch.chunk_labels, loss_seed=plan.step, skip_target=plan.skip_target, loss_scope=scope,
        )  # fmt: skip


def step_of(
    model: Any, plan: StepPlan, size: int, before: LossScope | None = None, gated: bool = True, ranks: int = 1
) -> tuple[dict[str, Any], StepSums, torch.Tensor, LossScope]:  # fmt: skip
    """Figures of the step in calls of `size` rows, dealt to `ranks`; with what made them."""
    made = batches(size, gated)
    own = [batch.counts(model.config, plan.step) for batch in made]
    names = [f.name for f in dataclasses.fields(LossCounts)]
    counts = LossCounts(*(sum(getattr(c, name) for c in own) for name in names))
    rate, window = (None, None) if before is None else (before.rate_L, before.window_P)
    scope = LossScope(counts, rate, window, plan.preview_scale)
    each = [StepSums(model.config, CPU) for _ in range(ranks)]
    for index, batch in enumerate(made):
        each[index % ranks].add(call(model, batch, plan, scope), batch)
    totals = torch.stack([sums.vector() for sums in each]).sum(0)
    return each[0].figures(totals, scope, plan), each[0], totals, scope


def previous() -> LossScope:
    """Means of a step before, far from this one's, so that a linearised penalty shows."""
    rate_L = torch.linspace(0.1, 0.95, LAYERS, dtype=torch.float64)
    return LossScope(LossCounts(1, 1, 1, 1, 1), rate_L, torch.tensor([1.5, 4.0]).double())


@pytest.mark.parametrize("mode", ["dense", "sample", "threshold"])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_in_parts_reports_what_the_whole_does(mode: str, size: int, step: int) -> None:
    """Against one call that knows nothing of steps: its own loss and its own parts."""
    model = lively(**OPTIONS)
    plan = plan_of(mode, step)
    (batch,) = batches(6)
    own_scope = None
    whole = call(model, batch, plan, own_scope)
    # A call that stands for itself does not warm the preview's weight up.
    warmed = (1 - plan.preview_scale) * model.config.loss_preview * whole.loss_parts["preview"]
    for before in (None, previous()):
        found, *_ = step_of(model, plan, size, before)
        for name, part in whole.loss_parts.items():
            assert found[f"loss/{name}"] == pytest.approx(float(part), rel=1e-4, abs=1e-6), name
        assert found["train/objective"] == pytest.approx(float(whole.loss - warmed), rel=1e-4)
        assert found["train/loss"] == found["loss/lm"]
        assert found["train/tokens"] == batch.tokens == 6 * T - 6


def test_rates_entropy_and_windows_are_means_over_the_step() -> None:
    model = lively(**OPTIONS)
    plan = plan_of("sample", 1)
    (batch,) = batches(6)
    out = call(model, batch, plan, None)
    where = batch.gated_BT
    prob = out.gate_prob[:, where].double()
    safe = prob.clamp(1e-6, 1 - 1e-6)
    entropy = -(safe * safe.log() + (1 - safe) * (1 - safe).log()).mean()
    found, *_ = step_of(model, plan, 2)
    assert found["gate/skip_ratio"] == pytest.approx(float(out.skip[:, where].double().mean()))
    assert found["gate/rate"] == pytest.approx(float(prob.mean()), rel=1e-5)
    assert found["gate/entropy"] == pytest.approx(float(entropy), rel=1e-5)
    rates = [found[f"gate/layer_{layer:02d}"] for layer in range(LAYERS)]
    assert rates == pytest.approx(out.skip[:, where].double().mean(1).tolist())
    assert 0 < found["preview/window"] < model.config.paw_horizon


def test_the_next_step_is_given_this_ones_means() -> None:
    model = lively(**OPTIONS)
    plan = plan_of("sample", 1)
    (batch,) = batches(6)
    out = call(model, batch, plan, None)
    for size in (1, 6):
        _, sums, totals, scope = step_of(model, plan, size)
        rate_L, window_P = sums.means(totals, scope.counts)
        assert rate_L is not None and window_P is not None
        wanted = out.gate_prob[:, batch.gated_BT].double().mean(1)
        assert rate_L.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
        report = out.loss_report
        mean_P = report.window_sum_P / report.counts.window
        assert window_P.tolist() == pytest.approx(mean_P.tolist(), rel=1e-5)


def test_ranks_add_up() -> None:
    model = lively(**OPTIONS)
    plan = plan_of("threshold", 2)
    one, *_ = step_of(model, plan, 1)
    two, *_ = step_of(model, plan, 1, ranks=2)
    assert two == pytest.approx({k: v if isinstance(v, str) else pytest.approx(v) for k, v in one.items()})  # fmt: skip


def test_a_step_in_which_no_gate_acts_has_no_gate_loss() -> None:
    model = lively(**OPTIONS)
    found, sums, totals, scope = step_of(model, plan_of("sample", 1), 3, gated=False)
    assert found["loss/gate"] == 0 and found["gate/skip_ratio"] == 0
    assert sums.means(totals, scope.counts)[0] is None
    assert math.isfinite(found["train/objective"])


def test_a_loss_that_is_not_finite_is_seen() -> None:
    model = lively(**OPTIONS)
    _, sums, totals, scope = step_of(model, plan_of("sample", 1), 3)
    assert sums.figures(totals, scope, plan_of("sample", 1))["train/finite"] is True
    totals[len(sums.parts) - 1] = math.nan
    assert sums.figures(totals, scope, plan_of("sample", 1))["train/finite"] is False


def test_a_plain_backbone_reports_its_loss_alone() -> None:
    model = lively(paw=False, chunk=False, gate=False)
    found, sums, totals, scope = step_of(model, plan_of("dense", 0), 2)
    assert found["train/objective"] == found["train/loss"] == found["loss/lm"]
    assert {name for name in found if "/" in name} == {
        "train/loss", "train/objective", "loss/lm", "train/phase", "train/tokens", "train/finite",
    }  # fmt: skip
    assert sums.means(totals, scope.counts) == (None, None)
