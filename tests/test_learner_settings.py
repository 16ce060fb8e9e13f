"""What the PPO learner can be told, how an update is planned, and which parameters train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fbs_rl.config import from_tree, to_tree
from fbs_rl.gate_bundle import GateParts, gate_tensors
from fbs_rl.rl.learner_settings import PRESETS, LearnerSettings, Trains
from fbs_rl.rl.trainable import frozen_digest, set_trainable
from fbs_rl.rl.update_plan import plan_update
from tests.learners import made
from tests.tiny import LAYERS, fresh, lively


def test_presets_are_trees_of_settings() -> None:
    assert from_tree(LearnerSettings, PRESETS["default"]) == LearnerSettings()
    paper = from_tree(LearnerSettings, PRESETS["paper"])
    assert paper.has_critic and not paper.dense_is_fixed and not LearnerSettings().has_critic
    assert paper.bundle_parts is GateParts.GATES_AND_PAW
    assert LearnerSettings().bundle_parts is GateParts.GATES and LearnerSettings().dense_is_fixed
    assert from_tree(LearnerSettings, to_tree(paper)) == paper


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"lr_gates": -1.0}, "lr_gates is -1.0; give 0 or more"),
        ({"lr_gates": 0.0}, "nothing would train"),
        ({"target_kl": 0.0}, "null for no early stop"),
        ({"curriculum_frac": 2.0}, "curriculum_frac is 2.0"),
        ({"self_test": {"tokens": 0}}, "self_test.tokens is 0"),
        ({"self_test": {"kl": -1.0}}, "self_test.kl is -1.0"),
        ({"collapse": {"prob_low": 0.6, "prob_high": 0.5}}, "the lower first"),
        ({"collapse": {"patience": 0}}, "collapse.patience is 0"),
        ({"runtime": {"precision": "fp16"}}, "runtime.precision is 'fp16'"),
        ({"runtime": {"threads": 0}}, "runtime.threads is 0"),
        ({"lr_gate": 1.0}, "did you mean lr_gates"),
    ],
)
def test_settings_that_cannot_work_are_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_tree(LearnerSettings, tree)


def test_an_update_is_planned_by_its_number() -> None:
    config = lively().config
    tree = {
        "updates": 11, "never_skip": [-1], "temperature_end": 0.4, "temperature_frac": 0.5,
        "lr_final_frac": 0.0, "entropy_final_frac": 0.5, "curriculum_frac": 0.4,
    }  # fmt: skip
    settings = from_tree(LearnerSettings, tree)
    plans = [plan_update(step, settings, config) for step in (*range(11), 30)]
    assert [p.policy.temperature for p in plans[:6]] == [1.0] * 6
    assert [round(p.policy.temperature, 6) for p in plans[6:]] == [.88, .76, .64, .52, .4, .4]  # fmt: skip
    assert [round(p.lr_scale, 6) for p in plans[::5]] == [1.0, 0.5, 0.0]
    assert [p.entropy_scale for p in plans[::5]] == [1.0, 0.75, 0.5]
    # The middle third of 8 layers is 3 and 4; the boundary layer is 2; the last never skips.
    assert plans[0].never_skip == (0, 1, 2, 5, 6, 7) and plans[0].deciding == (3, 4)
    assert plans[5].never_skip == (2, 7) and plans[5].deciding == (0, 1, 3, 4, 5, 6)
    free = [len(plan.deciding) for plan in plans]
    assert free == sorted(free)
    with pytest.raises(ValueError, match="no layer may skip in update 0"):
        plan_update(0, replace(settings, never_skip=tuple(range(LAYERS))), config)


def test_what_trains_is_what_a_bundle_carries() -> None:
    model = made()
    for trains, parts in ((Trains.GATES, "gates"), (Trains.GATES_AND_PAW, "gates+paw")):
        found = set_trainable(model, trains)
        wanted = gate_tensors(model, parts)
        assert found.keys() == wanted.keys()
        assert all(found[name] is wanted[name] for name in wanted)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys()
    window = set_trainable(model, Trains.GATES_AND_WINDOW).keys()
    extra = {name.split(".paw.")[1] for name in window if ".skip_gate." not in name}
    assert extra == {"window_in.weight", "window_out.weight", "window_out.bias"}


def test_models_without_the_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="no gates to train"):
        set_trainable(fresh(gate=False), Trains.GATES)
    with pytest.raises(ValueError, match="no such part of PAW; set trains to gates"):
        set_trainable(fresh(paw_window="fixed"), Trains.GATES_AND_WINDOW)


def test_the_digest_sees_every_frozen_tensor_and_no_trained_one() -> None:
    model = made()
    trained = set_trainable(model, Trains.GATES)
    before = frozen_digest(model, trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
        assert frozen_digest(model, trained) == before
        for name in ("model.norm.weight", "model.layers.4.paw.strength", "model.preview.log_prior_N"):  # fmt: skip
            tensor = model.state_dict()[name]
            tensor.flatten()[0].add_(1e-3)
            assert frozen_digest(model, trained) != before
            tensor.flatten()[0].sub_(1e-3)
