"""From episodes to what PPO is told of each segment: rewards, advantages, and what a skip is worth by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import visible_keys
from fbs_rl.rl.advantages import SegmentRow, compute_advantages
from fbs_rl.rl.learner_settings import ComputeCredit, LearnerSettings
from fbs_rl.rl.replay import check_segment
from fbs_rl.rl.reward import (
    EpisodeReward,
    RewardSettings,
    episode_reward,
    skip_gain,
)
from fbs_rl.rl.rollout import EpisodeRollout, SegmentRollout
from fbs_rl.rl.skip_savings import skip_savings


@dataclass(frozen=True, slots=True)
class ScoredEpisode:
    """flops, dense_flops: of all of its gate columns."""

    episode: EpisodeRollout
    reward: EpisodeReward
    flops: int
    dense_flops: int


@dataclass(frozen=True, slots=True)
class SegmentCredit:
    """What one segment's gates are told; T columns, float32.

    gain_LT: what each skip adds through compute, on the advantages' scale (analytic credit only).
    target_T: value target (critic only).
    """

    advantage_T: Tensor
    gain_LT: Tensor | None = None
    target_T: Tensor | None = None


def score_episode(
    episode: EpisodeRollout, config: FBSConfig, settings: RewardSettings
) -> ScoredEpisode:
    """R of one episode with costs counted exactly from its traces; ValueError for traces of another model."""
    for segment in episode.segments:
        check_segment(segment, config)
    outcomes = [segment.outcome(config) for segment in episode.segments]
    return ScoredEpisode(
        episode,
        episode_reward(outcomes, settings),
        sum(int(o.flops_T.sum()) for o in outcomes),
        sum(int(o.dense_flops_T.sum()) for o in outcomes),
    )


def credit_segments(
    scored: Sequence[ScoredEpisode],
    config: FBSConfig,
    settings: LearnerSettings,
    never_skip: Sequence[int],
    values: Sequence[Tensor] | None = None,
) -> list[SegmentCredit]:
    """The credit of every segment, episode by episode. values: V of each one's columns (critic)."""
    analytic = settings.compute_credit is ComputeCredit.ANALYTIC
    rows = []
    for each in scored:
        shares = each.reward.quality_shares if analytic else each.reward.shares
        total = each.reward.quality_term if analytic else each.reward.total
        for segment, reward_T in zip(each.episode.segments, shares, strict=True):
            value_T = None if values is None else values[len(rows)]
            rows.append(SegmentRow(each.episode.question_id, segment.kind, reward_T, total, value_T))  # fmt: skip
    found = compute_advantages(rows, settings.advantages)
    segments = [(each, segment) for each in scored for segment in each.episode.segments]
    credits = []
    for index, (each, segment) in enumerate(segments):
        gain_LT = None
        if analytic:
            saved_LT = _savings(segment, config, never_skip)
            gain_LT = skip_gain(saved_LT, max(each.dense_flops, 1), settings.reward)
            gain_LT = (gain_LT / found.divisor[index]).float()
        target_T = found.value_target[index].float() if found.value_target else None
        credits.append(SegmentCredit(found.advantage[index].float(), gain_LT, target_T))
    return credits


def _savings(segment: SegmentRollout, config: FBSConfig, never_skip: Sequence[int]) -> Tensor:
    """FLOPs that each decision saves by skipping, int64 [L, T]."""
    trace = segment.trace
    skip_L1T = torch.from_numpy(trace.skip_TL.T.copy()).unsqueeze(1)
    keys_L1T = visible_keys(config, skip_L1T, torch.tensor([trace.decode_start]))
    chunks_1T = torch.from_numpy(trace.chunks_T.copy())[None]
    return skip_savings(config, keys_L1T, chunks_1T, never_skip)[:, 0]
