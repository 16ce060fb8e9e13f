"""A PPO learner goes on from its state to the bit, and from no other's."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from fbs_rl.gate_bundle import gate_tensors
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.learner_settings import PRESETS, LearnerSettings
from tests.learners import FREE, episodes, learner, made
from tests.tiny import enliven, fresh


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_learner_resumed_from_its_state_is_the_one_left_alone(preset: str) -> None:
    """To the bit, figures and weights."""

    def run(told: PPOLearner, steps: range) -> list[tuple[str, dict[str, Any]]]:
        return [(told.bundle(0).digest, told.update(episodes(step), step)) for step in steps]

    whole = learner(made(), **PRESETS[preset])
    found = run(whole, range(1))
    state = saved(whole.state_dict())
    wanted = run(whole, range(1, 3))
    again = learner(made(), **PRESETS[preset])
    again.load_state_dict(state)
    assert run(again, range(1, 3)) == wanted
    assert again.bundle(0).digest == whole.bundle(0).digest
    assert again.counters == whole.counters and again.counters["updates"] == 3
    assert len({digest for digest, _ in found + wanted}) == 3


def test_states_of_other_learners_are_refused() -> None:
    state = saved(learner(made()).state_dict())
    with pytest.raises(ValueError, match="belongs to another backbone"):
        learner(enliven(fresh(), seed=6)).load_state_dict(state)
    with pytest.raises(ValueError, match="had seed 7, not 8"):
        PPOLearner(made(), LearnerSettings(), 8).load_state_dict(state)
    with pytest.raises(ValueError, match="trained other parameters"):
        critic = {"credit": "episode", "baseline": "critic"}
        learner(made(), advantages=critic).load_state_dict(state)


def test_a_reference_can_be_given() -> None:
    other = enliven(fresh(), seed=6)
    told = learner(made(), collapse={"kl_max": FREE})
    told.load_reference(gate_tensors(other, "gates"))
    assert told.update(episodes(), 0)["ppo/kl_ref"] > 0.01
    with pytest.raises(ValueError, match="the reference differs in"):
        told.load_reference(gate_tensors(other, "gates+paw"))
