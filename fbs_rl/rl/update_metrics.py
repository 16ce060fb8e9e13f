"""The figures of one update, by the names that metrics.jsonl has them under.

Shape letters: L layers, B rows, C gate columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.rl.credit import ScoredEpisode
from fbs_rl.rl.mismatch import Mismatch
from fbs_rl.rl.ranks import Ranks

_BINS = 20
_SUMMED = (
    "ppo/loss", "ppo/policy_loss", "ppo/entropy", "ppo/approx_kl", "ppo/clip_frac", "ppo/kl_ref", "value/loss",
    "gate/skip_rate", "gate/expected_skip_rate", "gate/at_bound_frac",
)  # fmt: skip
"""Metrics of ppo_loss whose shares add up over the calls of a step."""
_RENAMED = {"gate/skip_rate": "gate/decision_skip_rate"}  # gate/skip_rate is over all layers here


class LossSums:
    """Adds up what ppo_loss reports, over the calls of several optimizer steps and at the end over ranks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMMED), dtype=torch.float64, device=device)
        self.ratio_max = torch.ones(1, dtype=torch.float64, device=device)
        self.steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        zero = self.sums.new_zeros(())
        self.sums += torch.stack([metrics.get(name, zero).double() for name in _SUMMED])
        self.ratio_max = torch.maximum(self.ratio_max, metrics["ppo/ratio_max"].double())

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Means over the steps; ppo/ratio_max is the largest of ρ and 1/ρ."""
        means = ranks.sum(self.sums.clone()).div(max(self.steps, 1)).tolist()
        found = {_RENAMED.get(n, n): mean for n, mean in zip(_SUMMED, means, strict=True)}
        return {**found, "ppo/ratio_max": float(ranks.largest(self.ratio_max.clone()))}


class ProbabilitySums:
    """Means and histogram of the gates' own p at decisions."""

    def __init__(self, layer_count: int, device: torch.device) -> None:
        self.sum_L = torch.zeros(layer_count, dtype=torch.float64, device=device)
        self.count_L = torch.zeros(layer_count, dtype=torch.float64, device=device)
        self.bins = torch.zeros(_BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, prob_LBC: Tensor, decides_LBC: Tensor) -> None:
        self.sum_L += torch.where(decides_LBC, prob_LBC, 0.0).double().sum((1, 2))
        self.count_L += decides_LBC.sum((1, 2))
        place = (prob_LBC[decides_LBC] * _BINS).long().clamp(0, _BINS - 1)
        self.bins += torch.bincount(place, minlength=_BINS)

    def means(self, ranks: Ranks) -> tuple[dict[int, float], list[int]]:
        """(mean p of each layer that decides, decisions by p in 20 equal bins of [0, 1])."""
        sum_L, count_L = ranks.sum(self.sum_L.clone()), ranks.sum(self.count_L.clone())
        pairs = enumerate(zip(sum_L.tolist(), count_L.tolist(), strict=True))
        means = {layer: total / count for layer, (total, count) in pairs if count}
        return means, [int(n) for n in ranks.sum(self.bins.clone()).tolist()]


def reward_metrics(scored: Sequence[ScoredEpisode]) -> dict[str, float]:
    """Means over episodes, and the standard deviation of the total."""
    totals = [each.reward.total for each in scored]
    return {
        "reward/total": statistics.fmean(totals),
        "reward/total_std": statistics.pstdev(totals),
        "reward/compute_term": statistics.fmean(s.reward.compute_term for s in scored),
        "reward/quality_term": statistics.fmean(s.reward.quality_term for s in scored),
        "reward/compute_saved_frac": statistics.fmean(s.reward.compute_saved_frac for s in scored),
        "reward/nll_increase": statistics.fmean(s.reward.nll_increase for s in scored),
        "reward/episodes": len(scored),
    }


def trace_metrics(scored: Sequence[ScoredEpisode], free: Sequence[int]) -> dict[str, Any]:
    """What the rollouts executed: skips over all layers and columns, and exact FLOPs. free: layers that may skip."""
    traces = [segment.trace for each in scored for segment in each.episode.segments]
    skip_NL = np.concatenate([trace.skip_TL for trace in traces])
    rate_L = skip_NL.mean(0)
    return {
        "gate/skip_rate": float(rate_L.mean()),
        "gate/all_skip_rate": float(skip_NL[:, list(free)].all(1).mean()),
        "gate/executed_flops_frac": sum(s.flops for s in scored) / sum(s.dense_flops for s in scored),
        "gate/columns": len(skip_NL),
        "gate/protected_frac": float(np.concatenate([t.protected_T > 0 for t in traces]).mean()),
        **{f"gate/skip_layer_{layer}": float(rate) for layer, rate in enumerate(rate_L)},
    }  # fmt: skip


def mismatch_metrics(found: Mismatch) -> dict[str, float]:
    return {
        "mismatch/logp_max": found.logp_max,
        "mismatch/kl": found.kl,
        "mismatch/flip_rate": found.flip_rate,
    }
