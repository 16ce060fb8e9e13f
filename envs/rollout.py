"""Running an agent through episodes, and agents beside each other on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import gymnasium
import numpy as np

from envs.agents import Agent, decode_env
from envs.decode_env import Action
from envs.episode import SegmentTrace
from fbs_rl.rl.reward import EpisodeReward, SegmentOutcome


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """A finished episode.

    executed: per column, over both phases, what was skipped [L]. rewards: as they were paid. traces,
    outcomes: the self segment, then the gold one.
    """

    agent: str
    question: str
    executed: tuple[Action, ...]
    rewards: tuple[float, ...]
    traces: tuple[SegmentTrace, ...]
    outcomes: tuple[SegmentOutcome, ...]
    reward: EpisodeReward


def run_episode(
    env: gymnasium.Env[Any, Any],
    agent: Agent,
    options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> EpisodeRecord:
    """One episode. options, seed: of reset; the agent's policy_cost is added where options name none.

    Raises ValueError if a limit cuts the episode off, which leaves it without a reward.
    """
    inner = decode_env(env)
    observation, info = env.reset(
        seed=seed, options={"policy_cost": agent.policy_cost} | (options or {})
    )
    executed: list[Action] = []
    rewards: list[float] = []
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(agent.act(observation, info))
        executed.append(info["executed"])
        rewards.append(float(reward))
        if truncated and not terminated:
            raise ValueError(
                f"the episode was cut off after {len(rewards)} columns; run it without a limit on steps"
            )
    return EpisodeRecord(
        agent.name,
        info["question"],
        tuple(executed),
        tuple(rewards),
        inner.traces,
        inner.outcomes(),
        inner.episode_reward(),
    )


@dataclass(frozen=True, slots=True)
class AgentRow:
    """What an agent did on some questions.

    skip_ratio: over all layers and columns. executed_frac: ΣC / ΣC_full. nll_increase, compute_term,
    quality_term, reward: means over episodes.
    """

    agent: str
    episodes: int
    columns: int
    skip_ratio: float
    executed_frac: float
    nll_increase: float
    compute_term: float
    quality_term: float
    reward: float

    @classmethod
    def of(cls, records: Sequence[EpisodeRecord]) -> AgentRow:
        skips = np.concatenate([np.stack(r.executed) for r in records])
        segments = [outcome for r in records for outcome in r.outcomes]
        executed = sum(int(s.flops_T.sum()) for s in segments)
        return cls(
            agent=records[0].agent,
            episodes=len(records),
            columns=len(skips),
            skip_ratio=float(skips.mean()),
            executed_frac=executed / sum(int(s.dense_flops_T.sum()) for s in segments),
            nll_increase=fmean(r.reward.nll_increase for r in records),
            compute_term=fmean(r.reward.compute_term for r in records),
            quality_term=fmean(r.reward.quality_term for r in records),
            reward=fmean(r.reward.total for r in records),
        )


def compare_agents(
    env: gymnasium.Env[Any, Any],
    agents: Sequence[Agent],
    questions: Sequence[int],
    token_seed: int = 0,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
) -> list[AgentRow]:
    """A row for each agent, on the same questions with the same noise for drawn tokens.

    questions: indices into the environment's. on_episode is told each episode as it ends.
    """
    rows = []
    for agent in agents:
        records = []
        for index in questions:
            options = {"question": index, "token_seed": token_seed}
            records.append(run_episode(env, agent, options))
            on_episode(records[-1])
        rows.append(AgentRow.of(records))
    return rows
