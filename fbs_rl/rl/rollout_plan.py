"""Which episodes a step learns from: a function of the settings, the pool and the step alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.question_pool import QuestionPool
from fbs_rl.rl.questions import EncodedQuestion, Question
from fbs_rl.rl.rollout import RolloutTask
from fbs_rl.seeds import stable_hash

Chunk = list[RolloutTask]
"""Questions that one engine runs at once."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """pool: without prompts that are too long. encoded: its questions' tokens, by id."""

    settings: PPOSettings
    pool: QuestionPool
    encoded: Mapping[str, EncodedQuestion]

    def chunks(self, step: int) -> list[Chunk]:
        """Of training step `step`, from 0."""
        episodes = self.settings.episodes
        questions = self.pool.batch(step, episodes.prompts)
        return self._cut([self._task(q, step, episodes.samples) for q in questions])

    def heldout(self) -> list[Chunk]:
        """Of every evaluation: the same questions, one episode each."""
        questions = self.pool.heldout[: self.settings.evaluation.questions]
        return self._cut([self._task(q, -1, 1) for q in questions])

    def _task(self, question: Question, step: int, samples: int) -> RolloutTask:
        tokens, run = self.encoded[question.id], self.settings.seed
        seeds = (stable_hash("rollout", run, step, question.id, i) for i in range(samples))
        return RolloutTask(
            question.id, tuple(tokens.prompt_ids), tuple(tokens.answer_ids), tuple(seeds)
        )

    def _cut(self, tasks: Sequence[RolloutTask]) -> list[Chunk]:
        size = self.settings.episodes.chunk_prompts
        return [list(tasks[i : i + size]) for i in range(0, len(tasks), size)]
