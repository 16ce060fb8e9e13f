"""Reward for each column: by how much it moved the total that the episode is heading for.

Φ_t = R of the episode in which every column after t runs all layers; column t is paid Φ_t − Φ_{t−1}, with
Φ = 0 before the first. The payments of an episode telescope to its R. Φ_t reads nothing that comes later:

    a continuation that is not over    is taken to be as long as it may get
    its own dense pass                 is made when it is over; until then its tokens count as without penalty
    the gold answer's dense pass       is made beforehand, since its tokens are given

So a column is paid its compute share at once and, in the gold phase, its quality share; the continuation's
quality, and what its true length changes, is paid with its last column.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from envs.decode_episode import DecodeEpisode
from envs.episode import SegmentTrace, segment_outcome
from envs.settings import EnvSettings, PolicyCost
from fbs_rl.rl.reward import Sampler, SegmentKind, SegmentOutcome, episode_reward


def heading_for(
    episode: DecodeEpisode,
    settings: EnvSettings,
    cost: PolicyCost,
    self_dense_N: Tensor | None,
    gold_dense_N: Tensor,
) -> float:
    """Φ after the columns that were fed. self_dense_N: None while the continuation is not over."""
    segments: list[SegmentOutcome] = []
    config = episode.start.model.config
    if self_dense_N is None:
        made = _completed(episode.trace(), _none_N(settings.max_new_tokens))
        segments.append(segment_outcome(config, made, made.nll_gated_N, cost))
        gold = _unfed_gold(episode)
    else:
        segments.append(segment_outcome(config, episode.done[0], self_dense_N, cost))
        gold = episode.done[1] if episode.finished else episode.trace()
    gold = _completed(gold, gold_dense_N)
    segments.append(segment_outcome(config, gold, gold_dense_N, cost))
    return episode_reward(segments, settings.reward).total


def _none_N(tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.float64)


def _completed(trace: SegmentTrace, later_nll_N: Tensor) -> SegmentTrace:
    """`trace` and the columns after it up to N tokens, in which nothing skips and no chunk closes."""
    known, wanted = len(trace.token_ids), len(later_nll_N)
    more = wanted - known
    columns_LT = trace.skip_LT.new_zeros(len(trace.skip_LT), wanted - 1)
    columns_LT[:, : trace.columns] = trace.skip_LT
    closed = trace.closed_chunks
    return replace(
        trace,
        token_ids=(*trace.token_ids, *[0] * more),  # which tokens they are is not read from here on
        nll_gated_N=torch.cat((trace.nll_gated_N, later_nll_N[known:])),
        skip_LT=columns_LT,
        closed_chunks=None if closed is None else (*closed, *[closed[-1]] * more),
    )


def _unfed_gold(episode: DecodeEpisode) -> SegmentTrace:
    """The gold answer's first token, before any of its columns."""
    first = episode.encoded.answer_ids[0]
    start = episode.start
    return SegmentTrace(
        kind=SegmentKind.GOLD,
        sampled_by=Sampler.GIVEN,
        prompt_tokens=start.prompt_tokens,
        token_ids=(first,),
        nll_gated_N=-start.reading.log_prob_V[[first]],
        skip_LT=torch.zeros(start.model.config.layer_count, 0, dtype=torch.bool),
        closed_chunks=None if start.closed is None else tuple(start.closed),
    )
