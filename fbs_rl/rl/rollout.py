"""What a rollout engine is asked for and what it gives back: questions in, episodes with traces out.

The unit of work is a chunk of tasks that one engine runs by itself from beginning to end. What a chunk gives is
a function of the chunk, the gates and the settings, whoever runs it: products of other batch sizes differ in
their last bits, so a chunk is never split nor joined with another.

Letters: N tokens of a segment, T = N − 1 gate columns, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.reward import Sampler, SegmentKind, SegmentOutcome
from fbs_rl.seeds import stable_hash


def gate_seed(seed: int, kind: SegmentKind) -> int:
    """Of a sample's gates in one of its segments, which share positions and must not share draws."""
    return stable_hash("gates", str(kind), seed)


def token_seed(seed: int) -> int:
    """Of the tokens that the gated policy draws in a sample."""
    return stable_hash("tokens", seed)


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One question and how often it is tried. seeds: one for each sample, of gates and of sampled tokens."""

    question_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.answer_ids or not self.seeds:
            raise ValueError(
                f"question {self.question_id} has {len(self.prompt_ids)} prompt tokens, {len(self.answer_ids)} "
                f"answer tokens and {len(self.seeds)} samples; each must be at least one"
            )


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """sampled_by: who writes the continuation, the gated policy (GATED) or the dense model (DENSE, once a question).

    max_new_tokens: of the continuation, 0 for none (gold tokens only). temperature: of its tokens, 0 is greedy.
    policy: what gate decisions are drawn with; None takes thresholds at tau instead (evaluation).
    end_ids: tokens that end a continuation.
    """

    sampled_by: Sampler = Sampler.DENSE
    max_new_tokens: int = 128
    temperature: float = 0.0
    policy: GatePolicy | None = field(default_factory=GatePolicy)
    tau: float = 0.8
    never_skip: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.sampled_by is Sampler.GIVEN:
            raise ValueError('sampled_by is "given"; a continuation is "gated" or "dense"')
        if self.max_new_tokens < 0 or not self.temperature >= 0:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens} and temperature {self.temperature}; neither can be negative"
            )


@dataclass(frozen=True, slots=True)
class SegmentRollout:
    """One continuation of a prompt under the gates. nll_gated_N, nll_dense_N: float64, nats, of its tokens.

    trace: T columns; column j is what happened when token j was fed.
    """

    kind: SegmentKind
    sampled_by: Sampler
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    nll_gated_N: np.ndarray
    nll_dense_N: np.ndarray
    trace: GateTrace

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        shapes = (self.nll_gated_N.shape, self.nll_dense_N.shape)
        if shapes != ((tokens,), (tokens,)) or len(self.trace.skip_TL) != tokens - 1:
            raise ValueError(
                f"a segment of {tokens} tokens needs as many NLLs and {tokens - 1} columns, "
                f"got {shapes} and {len(self.trace.skip_TL)}"
            )

    def outcome(self, config: FBSConfig) -> SegmentOutcome:
        """The segment as the reward reads it, with its exact FLOPs; ValueError for a trace of another model."""
        cost = self.trace.cost(config) if len(self.trace.skip_TL) else None
        nll_gated_N, nll_dense_N = (
            torch.from_numpy(nll) for nll in (self.nll_gated_N, self.nll_dense_N)
        )
        return SegmentOutcome.of(self.kind, self.sampled_by, cost, nll_gated_N, nll_dense_N)


@dataclass(frozen=True, slots=True)
class EpisodeRollout:
    """One sample of one question. segments: self (if there is one), then gold. version: of the gates."""

    question_id: str
    sample: int
    seed: int
    version: int
    segments: tuple[SegmentRollout, ...]
