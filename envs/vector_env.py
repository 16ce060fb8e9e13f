"""The vector form of fbs_rl/Decode-v0: whole episodes on a rollout fleet, in which the model's own gates act.

In the single environment an agent outside of the model decides for each token. On a fleet the gates decide inside
the engines, thousands of times a second, so there is nothing for an action to say: one step is one episode of every
sub-environment, and the only action is 0, "go on". What the policy is, the gates, changes between steps, by
whoever syncs the fleet. To a learner this is a bandit: a question is shown, its episode's reward comes back.

Every step ends every episode, so sub-environments reset in the same step: the observation returned is the next
question, the finished episode is in the info's "final_info".

Shape letters: B sub-environments, T gate columns, N tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.credit import score_episode
from fbs_rl.rl.questions import EncodedQuestion
from fbs_rl.rl.reward import EpisodeReward, RewardSettings
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask

_SEEDS = 2**63
Questions = np.ndarray[Any, np.dtype[np.int64]]
"""[B]: the index of each sub-environment's question."""


class Fleet(Protocol):
    """What rolls chunks: actors.fleet.RolloutFleet, or anything else with this method."""

    def roll(
        self, chunks: Sequence[Sequence[RolloutTask]], settings: RolloutSettings
    ) -> list[list[EpisodeRollout]]: ...


class FleetVectorEnv(gymnasium.vector.VectorEnv[Questions, np.ndarray, np.ndarray]):
    """Observation: the index of the question that the next step answers. Action: 0. Reward: R.

    What a step gives is a function of the seed of the last reset with one, of the steps since, and of the gates.
    The fleet stays its owner's: closing the environment leaves it running.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        fleet: Fleet,
        config: FBSConfig,
        questions: Sequence[EncodedQuestion],
        num_envs: int = 1,
        rollout: RolloutSettings | None = None,
        reward: RewardSettings | None = None,
        chunk_questions: int = 8,
    ) -> None:
        """config: of the model that the fleet serves. chunk_questions: given to one worker at a time.

        Raises ValueError for numbers below 1 and for no questions.
        """
        if not questions:
            raise ValueError("no questions were given; an episode starts from one")
        if num_envs < 1 or chunk_questions < 1:
            raise ValueError(
                f"num_envs is {num_envs} and chunk_questions {chunk_questions}; each must be at least 1"
            )
        self.fleet, self.config, self.questions = fleet, config, tuple(questions)
        self.rollout, self.reward = rollout or RolloutSettings(), reward or RewardSettings()
        self.chunk_questions, self.num_envs = chunk_questions, num_envs
        self.single_observation_space = spaces.Discrete(len(self.questions))
        self.single_action_space = spaces.Discrete(1)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._question_B: Questions | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Questions, dict[str, Any]]:
        """options: "questions" [B], the indices of the first step; drawn where they are missing.

        Raises ValueError for another option, an index out of range, or one seed for each sub-environment: all
        of them draw from one generator.
        """
        if isinstance(seed, list):
            raise ValueError("one generator serves all sub-environments; give one seed, or None")
        super().reset(seed=seed)
        given = options or {}
        unknown = sorted(given.keys() - {"questions"})
        if unknown:
            raise ValueError(f"reset has no option {unknown[0]!r}; it has questions")
        self._question_B = self._draw()
        if "questions" in given:
            wanted = np.asarray(given["questions"], np.int64)
            if wanted.shape != (self.num_envs,) or not self.observation_space.contains(wanted):
                raise ValueError(
                    f"questions are {self.num_envs} indices from 0 to {len(self.questions) - 1}, "
                    f"got {given['questions']!r}"
                )
            self._question_B = wanted
        return self._question_B.copy(), self._question_info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[Questions, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """An episode of every sub-environment; all are terminated, none is ever truncated.

        final_info holds "question", "reward_terms" (as the single environment's) and "episode", an
        EpisodeRollout. Raises ResetNeeded before a reset, ValueError for actions outside the space, and what
        the fleet raises; the questions stay as they were then.
        """
        if self._question_B is None:
            raise gymnasium.error.ResetNeeded("no episode is running; call reset()")
        if not self.action_space.contains(np.asarray(actions)):
            raise ValueError(
                f"the actions are {self.num_envs} zeros, since the model's own gates act, got {actions!r}"
            )
        state = self.np_random.bit_generator.state
        seeds = [int(s) for s in self.np_random.integers(_SEEDS, size=self.num_envs)]
        try:
            episodes = self._roll(seeds)
        except BaseException:
            self.np_random.bit_generator.state = state
            raise
        rewards = [score_episode(e, self.config, self.reward).reward for e in episodes]
        infos: dict[str, Any] = {}
        for i, (episode, reward) in enumerate(zip(episodes, rewards, strict=True)):
            last = {
                "final_obs": self._question_B[i],
                "final_info": self._final_info(episode, reward),
            }
            infos = self._add_info(infos, last, i)
        self._question_B = self._draw()
        ended_B = np.ones(self.num_envs, bool)
        total_B = np.array([reward.total for reward in rewards])
        return (
            self._question_B.copy(), total_B, ended_B, ~ended_B, infos | self._question_info()
        )  # fmt: skip

    def _roll(self, seeds: Sequence[int]) -> list[EpisodeRollout]:
        assert self._question_B is not None
        asked = [self.questions[i] for i in self._question_B]
        tasks = [
            RolloutTask(question.id, question.prompt_ids, question.answer_ids, (seed,))
            for question, seed in zip(asked, seeds, strict=True)
        ]
        size = self.chunk_questions
        chunks = [tasks[i : i + size] for i in range(0, len(tasks), size)]
        return [e for episodes in self.fleet.roll(chunks, self.rollout) for e in episodes]

    def _draw(self) -> Questions:
        return self.np_random.integers(len(self.questions), size=self.num_envs)

    def _question_info(self) -> dict[str, Any]:
        assert self._question_B is not None
        infos: dict[str, Any] = {}
        for i, index in enumerate(self._question_B):
            infos = self._add_info(infos, {"question": self.questions[index].id}, i)
        return infos

    def _final_info(self, episode: EpisodeRollout, reward: EpisodeReward) -> dict[str, Any]:
        return {
            "question": episode.question_id,
            "episode": episode,
            "reward_terms": {
                "compute_saved": reward.compute_saved_frac,
                "nll_increase": reward.nll_increase,
                "beta": self.reward.beta,
                "lam": self.reward.lam,
                "compute_term": reward.compute_term,
                "quality_term": reward.quality_term,
                "total": reward.total,
            },
        }
