"""What a skip policy costs at any skip ratio: points along one knob, and equal skip between them.

A curve's knob (a threshold, a shift of all logits, a number of layers) is set on one half of the held-out questions
and measured on the other, so that no arm is given the skip ratio it is compared at. Values at a ratio between two
measured ones are interpolated linearly, question by question; beyond the last one there are none.

Shape letters: L layers, F figures, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.heldout_points import Heldout, Point, measure_point, own_dense, skip_of
from fbs_rl.rl.parallel_pass import (
    Gates,
    drawn_gates,
    fixed_gates,
    pass_texts,
    threshold_gates,
)
from fbs_rl.rl.reward import RewardSettings

Curve = tuple[Point, ...]
"""Points, the first of them without skips."""
_NEVER = 2.0  # a threshold that no probability reaches
_BISECTIONS = 9
_CLOSE = 0.004  # near enough: arms are compared between measured points


@dataclass(frozen=True, slots=True)
class Bench:
    """Where curves are measured. tuning: knobs are set there. scoring: one episode a question, for what draws
    nothing. drawn: several. ratios: that arms are compared at. never_skip: beyond the model's own.
    """

    model: FBSForCausalLM
    tuning: Heldout
    scoring: Heldout
    drawn: Heldout
    ratios: tuple[float, ...]
    never_skip: tuple[int, ...] = ()

    def thresholds(self, reward: RewardSettings, moved: bool) -> Curve:
        """The model's gates at thresholds. moved: its dense pass is no longer that of the start."""
        clip = self.model.config.gate_logit_clip

        def gates(knob: float, _: Heldout) -> Gates:
            return threshold_gates(1 / (1 + math.exp(knob)), self.never_skip)

        dense_RN = own_dense(self.model, self.scoring) if moved else None
        nothing = measure_point(
            self.model, self.scoring, threshold_gates(_NEVER), reward, 0.0, _NEVER, dense_RN
        )
        points = [
            measure_point(
                self.model, self.scoring, gates(knob, self.scoring), reward, ratio, 1 / (1 + math.exp(knob)), dense_RN
            )
            for ratio, knob in self._knobs(gates, -clip, clip)
        ]  # fmt: skip
        return (nothing, *points)

    def draws(self, policy: GatePolicy, reward: RewardSettings, moved: bool) -> Curve:
        """Gates drawn from the policy, all logits shifted alike. Its bounds hold the lowest ratios off."""
        reach = 2 * self.model.config.gate_logit_clip

        def gates(knob: float, where: Heldout) -> Gates:
            return drawn_gates(self.model.config, policy, where.seeds, self.never_skip, knob)

        dense_RN = own_dense(self.model, self.drawn) if moved else None
        nothing = measure_point(
            self.model, self.drawn, threshold_gates(_NEVER), reward, 0.0, None, dense_RN
        )
        points = [
            measure_point(
                self.model, self.drawn, gates(knob, self.drawn), reward, ratio, knob, dense_RN
            )
            for ratio, knob in self._knobs(gates, -reach, reach)
        ]
        return (nothing, *points)

    def at_rates(
        self, rates: Sequence[tuple[float, Sequence[float]]], reward: RewardSettings, seed: int
    ) -> Curve:
        """Gates that do not look. rates: (ratio asked for, skip rate of each layer)."""
        layers = self.model.config.layer_count
        return tuple(
            measure_point(
                self.model, self.drawn, fixed_gates(self.model.config, torch.tensor(rate_L), seed), reward, ratio,
                gates_on=False,
            )
            for ratio, rate_L in [(0.0, [0.0] * layers), *rates]
        )  # fmt: skip

    def random(self, reward: RewardSettings, seed: int) -> Curve:
        """Every layer that may skip does so with one probability."""
        config = self.model.config
        share = config.layer_count / len(self.free_layers)
        return self.at_rates([(r, [r * share] * config.layer_count) for r in self.asked], reward, seed)  # fmt: skip

    def static(self, reward: RewardSettings) -> Curve:
        """The layers dropped one after the other, the least harmful alone first."""
        layers, order = self.model.config.layer_count, self.drop_order()
        most = min(len(order), math.ceil(max(self.asked) * layers))
        rates = [
            (count / layers, [float(i in order[:count]) for i in range(layers)])
            for count in range(1, most + 1)
        ]
        once = replace(self, drawn=self.scoring)  # nothing is drawn
        return once.at_rates(rates, reward, 0)

    def drop_order(self) -> list[int]:
        """Layers that may skip, by what dropping each alone costs the questions of the tuning half."""
        harm = {}
        for layer in self.free_layers:
            rate_L = torch.zeros(self.model.config.layer_count)
            rate_L[layer] = 1.0
            gates = fixed_gates(self.model.config, rate_L)
            found = pass_texts(self.model, self.tuning.texts, gates, self.tuning.batch_tokens)
            increase_RN = (found.nll_RN - self.tuning.start_nll_RN) * found.scored_RN
            harm[layer] = float(increase_RN.sum())
        return sorted(harm, key=lambda layer: harm[layer])

    @property
    def asked(self) -> tuple[float, ...]:
        """The ratios and one beyond: what is set on one half falls a little short on the other."""
        most, free = max(self.ratios), len(self.free_layers) / self.model.config.layer_count
        return (*self.ratios, min(1.2 * most, (most + free) / 2))

    @property
    def free_layers(self) -> list[int]:
        forced = self.model.config.forced_layers(self.never_skip)
        return [i for i in range(self.model.config.layer_count) if i not in forced]

    def _knobs(
        self, gates: Callable[[float, Heldout], Gates], low: float, high: float
    ) -> list[tuple[float, float]]:
        """(ratio, the knob that gives about it on the tuning half); more is skipped as a knob rises."""
        known, found = [(low, 0.0), (high, 1.0)], []
        for ratio in self.asked:
            knob = low
            for _ in range(_BISECTIONS):
                below = max(knob for knob, skip in known if skip <= ratio)
                # What is skipped moves later gates, so a higher knob may for once skip less.
                above = min(knob for knob, skip in known if skip > ratio and knob > below)
                knob = (below + above) / 2
                skip = skip_of(self.model, self.tuning, gates(knob, self.tuning))
                known.append((knob, skip))
                if abs(skip - ratio) <= _CLOSE:
                    break
            found.append((ratio, knob))
        return found


# --- equal skip -------------------------------------------------------------------------------------


def at_skip(curve: Curve, skip: float) -> Point | None:
    """What the curve has at a skip ratio, between its two neighbours; None beyond its last point."""
    points = sorted(curve, key=lambda point: point.skip)
    above = next((i for i, point in enumerate(points) if point.skip >= skip), None)
    if above is None:
        return None
    upper = points[above]
    if above == 0:
        return upper if upper.skip == skip else None
    lower = points[above - 1]
    weight = (skip - lower.skip) / (upper.skip - lower.skip)
    mixed_FQ = lower.figures_FQ * (1 - weight) + upper.figures_FQ * weight
    pairs = zip(lower.rate_L, upper.rate_L, strict=True)
    return Point(skip, None, tuple(a * (1 - weight) + b * weight for a, b in pairs), mixed_FQ)
