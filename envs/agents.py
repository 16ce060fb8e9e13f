"""Agents to compare a learned policy with. None of them looks at more than an observation and an info.

Shape letters: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np

from envs.decode_env import Action, DecodeEnv
from envs.observation import Observation
from envs.settings import PolicyCost
from fbs_rl.seeds import stable_hash
from fbs_rl.types import GateMode


class Agent(Protocol):
    """Says which layers the next token skips. policy_cost: what deciding so would cost when deployed."""

    @property
    def name(self) -> str: ...

    @property
    def policy_cost(self) -> PolicyCost: ...

    def act(self, observation: Observation, info: dict[str, Any]) -> Action:
        """[L] of 0 and 1. info: of the reset or step that gave the observation."""
        ...


def decode_env(env: gymnasium.Env[Any, Any]) -> DecodeEnv:
    """The DecodeEnv below any wrappers; ValueError if there is none."""
    inner = env.unwrapped
    if not isinstance(inner, DecodeEnv):
        raise ValueError(f"the environment is a {type(inner).__name__}; this needs a DecodeEnv")
    return inner


def free_layers(env: DecodeEnv) -> tuple[int, ...]:
    """Layers that may skip, ascending."""
    return tuple(i for i in range(env.model.config.layer_count) if i not in env.forced)


def spread_layers(env: DecodeEnv, skip_ratio: float) -> tuple[int, ...]:
    """Layers that may skip, evenly spread, so many that skipping them gives `skip_ratio` over all layers.

    Raises ValueError if there are not so many.
    """
    free, layers = free_layers(env), env.model.config.layer_count
    wanted = round(_share(env, skip_ratio) * len(free))
    if wanted == 0:
        raise ValueError(
            f"a skip ratio of {skip_ratio} is less than half of one of {layers} layers"
        )
    at = (np.arange(wanted) + 0.5) * len(free) / wanted
    return tuple(free[int(i)] for i in at)


def _share(env: DecodeEnv, skip_ratio: float) -> float:
    """Which share of the layers that may skip makes `skip_ratio` over all layers."""
    free, layers = len(free_layers(env)), env.model.config.layer_count
    if not 0 <= skip_ratio * layers <= free:
        raise ValueError(
            f"a skip ratio of {skip_ratio} is more than the layers that may skip ({free} of {layers}), "
            f"or below 0"
        )
    return skip_ratio * layers / free


@dataclass(frozen=True, slots=True)
class FixedAgent:
    """Skips the same layers for every token; none of them is the dense baseline."""

    name: str
    skipped_L: Action
    policy_cost: PolicyCost = PolicyCost.NONE

    @classmethod
    def never(cls, env: DecodeEnv) -> FixedAgent:
        return cls.skipping(env, (), "never")

    @classmethod
    def skipping(cls, env: DecodeEnv, layers: Iterable[int], name: str = "static") -> FixedAgent:
        """Raises ValueError for a layer that the model does not have."""
        count = env.model.config.layer_count
        skipped_L = np.zeros(count, np.int8)
        for layer in layers:
            if not 0 <= layer < count:
                raise ValueError(
                    f"there is no layer {layer}; the model has layers 0 to {count - 1}"
                )
            skipped_L[layer] = 1
        return cls(name, skipped_L)

    def act(self, observation: Observation, info: dict[str, Any]) -> Action:
        return self.skipped_L.copy()


@dataclass(frozen=True, slots=True)
class RandomAgent:
    """Skips every layer that may skip with one probability; draws are a function of (seed, question, column)."""

    name: str
    prob_L: np.ndarray[Any, np.dtype[np.float64]]
    seed: int = 0
    policy_cost: PolicyCost = PolicyCost.NONE

    @classmethod
    def at_rate(cls, env: DecodeEnv, skip_ratio: float, seed: int = 0) -> RandomAgent:
        """skip_ratio: expected, over all layers. Raises ValueError if too few layers may skip."""
        prob_L = np.zeros(env.model.config.layer_count)
        prob_L[list(free_layers(env))] = _share(env, skip_ratio)
        return cls(f"random:{skip_ratio:g}", prob_L, seed)

    def act(self, observation: Observation, info: dict[str, Any]) -> Action:
        draw = np.random.default_rng(
            stable_hash(self.seed, "skip", info["question"], info["column"])
        )
        return (draw.random(len(self.prob_L)) < self.prob_L).astype(np.int8)


@dataclass(frozen=True, slots=True)
class ModelGateAgent:
    """The model's own gates, asked before each token by a step on a copy of the cache.

    tau: of mode threshold (None: the model's). seed: of mode sample; each phase of each question has
    noise of its own.
    """

    name: str
    env: DecodeEnv = field(repr=False)
    mode: GateMode = GateMode.THRESHOLD
    tau: float | None = None
    seed: int = 0
    policy_cost: PolicyCost = PolicyCost.GATES

    def act(self, observation: Observation, info: dict[str, Any]) -> Action:
        seed = stable_hash(self.seed, "gate", info["question"], info["phase"])
        return self.env.own_gate(self.mode, self.tau, seed)
