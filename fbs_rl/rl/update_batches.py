"""One update's segments as minibatches of calls, and what is known of each call before the first step.

Minibatches are drawn once an update and visited in another order each epoch. So a segment meets the same
neighbours every time, its probabilities come out of the same products, and ratios start at exactly 1; and which
segments share an optimizer step depends neither on micro_tokens nor on the number of ranks.

Shape letters: L layers, B rows, C gate columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.rl.credit import SegmentCredit
from fbs_rl.rl.gate_views import GateViews
from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.ppo_loss import LossInputs, Ratio, StepCounts, ValueInputs, decision_mask
from fbs_rl.rl.replay import ReplayBatch, cut_batches
from fbs_rl.rl.rollout import EpisodeRollout, SegmentRollout, gate_seed
from fbs_rl.rl.update_plan import UpdatePlan
from fbs_rl.seeds import stable_hash


@dataclass(frozen=True, slots=True)
class UpdateSegments:
    """All segments of some episodes, in order. seed: of the noise that each one's gates were drawn with."""

    segments: tuple[SegmentRollout, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, episodes: Sequence[EpisodeRollout]) -> UpdateSegments:
        """Raises ValueError where no gate acted at all."""
        pairs = [(s, gate_seed(e.seed, s.kind)) for e in episodes for s in e.segments]
        if not any(len(segment.trace.skip_TL) for segment, _ in pairs):
            raise ValueError(
                f"{len(episodes)} episodes hold no gate column; give segments of two tokens or more"
            )
        return cls(tuple(segment for segment, _ in pairs), tuple(seed for _, seed in pairs))

    @property
    def columns(self) -> list[int]:
        return [len(segment.trace.skip_TL) for segment in self.segments]


@dataclass(slots=True)
class Call:
    """A batch with its decisions and, once they are known, the inputs of its loss.

    decides_LBC: where its gates took a decision. views: what its gates read, if that is kept. inputs: prob_LBT is the
    p before the update. value_BC: V then.
    """

    batch: ReplayBatch
    decides_LBC: Tensor
    views: GateViews | None = None
    inputs: LossInputs | None = None
    value_BC: Tensor | None = None

    def uniform(self, seeds: Sequence[int], gate_block: int) -> Tensor:
        """The noise [L, B, C] that its gates were drawn with: one number a block, its leader's."""
        layer_L11 = torch.arange(len(self.decides_LBC), device=self.decides_LBC.device)
        layer_L11 = layer_L11.view(-1, 1, 1)
        seed_B = torch.tensor([seeds[row] for row in self.batch.rows], device=layer_L11.device)
        return gate_uniform(seed_B, self.batch.place_BC, layer_L11 - layer_L11 % gate_block)

    def take_credit(self, credits: Sequence[SegmentCredit]) -> None:
        """Complete the inputs of the loss."""
        assert self.inputs is not None
        mine = [credits[row] for row in self.batch.rows]
        gains = [credit.gain_LT for credit in mine if credit.gain_LT is not None]
        targets = [credit.target_T for credit in mine if credit.target_T is not None]
        values = None
        if targets and self.value_BC is not None:
            values = ValueInputs(self.value_BC, self.value_BC, self.batch.columns(targets))
        self.inputs = replace(
            self.inputs,
            advantage_BT=self.batch.columns([credit.advantage_T for credit in mine]),
            skip_gain_LBT=self.batch.columns(gains) if gains else None,
            values=values,
        )


@dataclass(frozen=True, slots=True)
class Minibatch:
    """The calls of one optimizer step that this rank runs. counts: over those of all ranks."""

    calls: tuple[Call, ...]
    counts: StepCounts


def draw_minibatches(
    found: UpdateSegments,
    settings: LearnerSettings,
    config: FBSConfig,
    plan: UpdatePlan,
    seed: int,
) -> list[list[Call]]:
    """Calls of every rank, by minibatch: as many minibatches as asked, or fewer where segments are fewer."""
    decided = [row for row, columns in enumerate(found.columns) if columns]
    order = shuffled(len(decided), stable_hash("minibatches", seed, plan.step))
    parts = [order[start :: settings.minibatches] for start in range(settings.minibatches)]
    return [
        cut_calls(found, [decided[i] for i in part], settings.micro_tokens, config, plan)
        for part in parts
        if part
    ]


def cut_calls(
    found: UpdateSegments,
    rows: Sequence[int],
    micro_tokens: int,
    config: FBSConfig,
    plan: UpdatePlan,
) -> list[Call]:
    """Calls over `rows`, without inputs yet."""
    return [
        Call(batch, decision_mask(config.layer_count, plan.deciding, batch.free_BC))
        for batch in cut_batches(found.segments, rows, micro_tokens)
    ]


def share_of(
    minibatches: Sequence[Sequence[Call]], rank: int, ranks: int, ratio: Ratio, device: torch.device
) -> list[Minibatch]:
    """This rank's calls of each minibatch, on `device`. Each minibatch is dealt out from another rank on."""
    shares = []
    for offset, calls in enumerate(minibatches):
        counts = StepCounts(0, 0, 0)
        for call in calls:
            counts = counts + StepCounts.of(call.decides_LBC, ratio)
        mine = [
            Call(call.batch.to(device), call.decides_LBC.to(device))
            for index, call in enumerate(calls)
            if (index + offset) % ranks == rank
        ]
        shares.append(Minibatch(tuple(mine), counts))
    return shares


def shuffled(count: int, seed: int) -> list[int]:
    """0 .. count − 1 in an order that is a function of `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
