"""PPO learners on tiny models, and episodes for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fbs_rl.config import from_tree
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.ranks import Ranks
from fbs_rl.rl.rollout import EpisodeRollout
from tests.gate_rollouts import Question, make_episodes, make_questions
from tests.tiny import enliven, fresh, lively

FREE = 9.0
"""A KL limit that no gate of these tests reaches."""


def made(**options: Any) -> Any:
    """A model of the test's own, whose modules all act."""
    return enliven(fresh(**options))


def learner(model: Any, ranks: Ranks | None = None, **tree: Any) -> PPOLearner:
    quick = {"lr_gates": 1e-3, "lr_paw": 1e-3, "minibatches": 2, "epochs": 2, "target_kl": None}
    return PPOLearner(model, from_tree(LearnerSettings, {**quick, **tree}), 7, ranks)


@lru_cache
def questions(count: int = 3) -> tuple[Question, ...]:
    return tuple(make_questions(lively(), count, tokens=8))


@lru_cache
def episodes(step: int = 0, protected: float = 0.2) -> tuple[EpisodeRollout, ...]:
    """Three rollouts of three questions under the gates of `lively()`, which `made()` starts with."""
    return tuple(make_episodes(lively(), questions(), 3, step, protected=protected))
