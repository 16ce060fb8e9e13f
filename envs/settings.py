"""What can be chosen about the decoding environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fbs_rl.rl.reward import RewardSettings


class RewardAt(StrEnum):
    """When the episode's reward is paid. The rewards of an episode add up to the same total either way."""

    END = "end"  # all of it with the last column
    TOKEN = "token"  # with each column, by how much it moved the total (envs.payment)


class PolicyCost(StrEnum):
    """What deciding costs, on top of the layers that ran."""

    NONE = "none"  # nothing: a constant, a rule
    GATES = "gates"  # the model's own gates, once a column


@dataclass(frozen=True, slots=True)
class EnvSettings:
    """Settings of a DecodeEnv.

    max_new_tokens: at most so many tokens in the decode phase. temperature: of drawn tokens; 0 is greedy.
    never_skip: layers that always run, besides the model's own. policy_cost: counted in executed FLOPs
    unless reset's options say otherwise. state_features: width of the observation's "state". max_steps:
    truncate an episode after so many columns (None: never).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    never_skip: tuple[int, ...] = ()
    reward: RewardSettings = field(default_factory=RewardSettings)
    reward_at: RewardAt = RewardAt.END
    policy_cost: PolicyCost = PolicyCost.NONE
    state_features: int = 64
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "state_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(
                f"max_steps is {self.max_steps}; give at least 1, or None for no limit"
            )
