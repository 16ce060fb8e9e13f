"""Held-out questions under some gates: what is skipped, what it saves and what it costs, question by question.

Shape letters: L layers, R rows (segments), E episodes, Q questions, N tokens, C gate columns, F figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import count_trace
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.parallel_pass import Gates, GivenText, PassedTexts, dense_gates, pass_texts
from fbs_rl.rl.reward import QualityTokens, RewardSettings, SegmentKind
from fbs_rl.rl.rollout import gate_seed

FIGURES = (
    "skipped", "places", "flops", "dense_flops", "dnll_gold", "dnll_self", "reward", "compute_term", "quality_term",
)  # fmt: skip
"""Of each question: skipped layers and how many there were, FLOPs of its columns, mean NLL increase of either segment's
tokens over the dense pass of the model that the study began with (nats, unclipped), the reward and its two terms."""
_SUMS = FIGURES[:4]


@dataclass(frozen=True, slots=True)
class Heldout:
    """Episodes of some questions: of each `samples` ones with the same text and other draws.

    texts, kinds, seeds: of each row. episode_R: which episode a row belongs to; those of a question are neighbours.
    start_nll_RN: dense NLLs of the model that the study began with.
    """

    texts: tuple[GivenText, ...]
    kinds: tuple[SegmentKind, ...]
    seeds: tuple[int, ...]
    episode_R: Tensor
    samples: int
    start_nll_RN: Tensor
    batch_tokens: int

    @classmethod
    def of(
        cls, model: FBSForCausalLM, segments: Sequence[dict[SegmentKind, GivenText]],
        seeds: Sequence[int], samples: int, batch_tokens: int,
    ) -> Heldout:  # fmt: skip
        """segments, seeds: of each question. Its further samples have seeds behind its own."""
        rows = [
            (text, kind, gate_seed(seed + sample, kind), question * samples + sample)
            for question, (by_kind, seed) in enumerate(zip(segments, seeds, strict=True))
            for sample in range(samples)
            for kind, text in by_kind.items()
        ]
        texts, kinds, drawn, episodes = zip(*rows, strict=True)
        device = model.model.embed_tokens.weight.device
        distinct = list(dict.fromkeys(texts))
        dense = pass_texts(model, distinct, dense_gates(), batch_tokens).nll_RN
        place = {text: number for number, text in enumerate(distinct)}
        start_nll_RN = dense[torch.tensor([place[text] for text in texts], device=device)]
        return cls(
            texts, kinds, drawn, torch.tensor(episodes, device=device), samples, start_nll_RN, batch_tokens
        )  # fmt: skip

    @property
    def questions(self) -> int:
        return (int(self.episode_R.max()) + 1) // self.samples

    def of_kind(self, kind: SegmentKind) -> Tensor:
        """[R] bool."""
        return torch.tensor([k is kind for k in self.kinds], device=self.episode_R.device)


@dataclass(frozen=True, slots=True)
class Point:
    """What some gates do. parameter: what they were set to. rate_L: skip rate of each layer. figures_FQ: FIGURES."""

    asked: float | str
    parameter: float | None
    rate_L: tuple[float, ...]
    figures_FQ: np.ndarray

    def of(self, name: str) -> np.ndarray:
        """A figure of every question, [Q]."""
        return self.figures_FQ[FIGURES.index(name)]

    @property
    def skip(self) -> float:
        """Over all layers and columns of all questions."""
        return self.of("skipped").sum() / self.of("places").sum()

    def record(self) -> dict[str, Any]:
        """Sums as ratios, the rest as means over questions."""
        means = {name: float(self.of(name).mean()) for name in FIGURES if name not in _SUMS}
        return {
            "skip": float(self.skip),
            "flops_frac": float(self.of("flops").sum() / self.of("dense_flops").sum()),
            **means,
            "questions": self.figures_FQ.shape[1],
        }


def skip_of(model: FBSForCausalLM, heldout: Heldout, gates: Gates) -> float:
    """The share of all layers and columns that these gates skip."""
    found = pass_texts(model, heldout.texts, gates, heldout.batch_tokens)
    return int(found.skip_LRC.sum()) / (len(found.skip_LRC) * int(found.acted_RC.sum()))


def measure_point(
    model: FBSForCausalLM,
    heldout: Heldout,
    gates: Gates,
    reward: RewardSettings,
    asked: float | str,
    parameter: float | None = None,
    own_dense_RN: Tensor | None = None,
    gates_on: bool = True,
) -> Point:
    """One pass over the questions. own_dense_RN: dense NLLs of the model as it is now, which the reward is of (None:
    as at the start). gates_on: gates were computed, and cost."""
    found = pass_texts(model, heldout.texts, gates, heldout.batch_tokens)
    dense_RN = heldout.start_nll_RN if own_dense_RN is None else own_dense_RN
    figures_FQ = question_figures(model.config, heldout, found, dense_RN, reward, gates_on)
    rate_L = found.skip_LRC.sum((1, 2)) / found.acted_RC.sum()
    return Point(asked, parameter, tuple(rate_L.tolist()), figures_FQ.cpu().numpy())


def own_dense(model: FBSForCausalLM, heldout: Heldout) -> Tensor:
    """Dense NLLs [R, N] of the model as it is now."""
    return pass_texts(model, heldout.texts, dense_gates(), heldout.batch_tokens).nll_RN


def question_figures(
    config: FBSConfig, heldout: Heldout, found: PassedTexts, dense_RN: Tensor, reward: RewardSettings, gates_on: bool
) -> Tensor:  # fmt: skip
    """FIGURES [F, Q], float64: means over a question's samples. The reward is fbs_rl.rl.reward's, all rows at once."""
    cost = count_trace(
        config, found.skip_LRC, found.start_R, gates_on, found.chunks_RC, found.opens_RC, found.acted_RC
    )  # fmt: skip
    episode_R, count = heldout.episode_R, heldout.questions * heldout.samples

    def total(values_R: Tensor) -> Tensor:
        sums_E = torch.zeros(count, dtype=torch.float64, device=values_R.device)
        return sums_E.index_add(0, episode_R, values_R.double())

    tokens_R = found.scored_RN.sum(1)
    increase_R = ((found.nll_RN - heldout.start_nll_RN) * found.scored_RN).double().sum(1)
    gold_R = heldout.of_kind(SegmentKind.GOLD)
    floor = 0.0 if reward.only_increase else reward.nll_floor
    penalty_RN = (found.nll_RN - dense_RN).double().clamp(floor, reward.nll_ceiling)
    counts_R = gold_R | (reward.quality is QualityTokens.GOLD_AND_SELF)
    penalty_R = (penalty_RN * found.scored_RN).sum(1) * counts_R
    flops_E, dense_E = total(cost.flops_BT.sum(1)), total(cost.dense_flops_BT.sum(1))
    decided_E = dense_E > 0  # an episode without a column decided nothing, and is paid nothing
    compute_E = reward.beta * (1 - flops_E / dense_E.clamp_min(1)) * decided_E
    quality_E = -reward.lam * total(penalty_R) / total(tokens_R * counts_R) * decided_E
    own_R = ~gold_R
    by_episode = (
        total(found.skip_LRC.sum((0, 2))),
        total(found.acted_RC.sum(1)) * config.layer_count,
        flops_E,
        dense_E,
        total(increase_R * gold_R) / total(tokens_R * gold_R),
        total(increase_R * own_R) / total(tokens_R * own_R).clamp_min(1),
        compute_E + quality_E,
        compute_E,
        quality_E,
    )
    return torch.stack(by_episode).view(len(FIGURES), -1, heldout.samples).mean(2)
