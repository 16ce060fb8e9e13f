"""The figures of a step: sums over its calls and ranks, and what they mean once added up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.objective import rate_penalty, window_drift
from fbs_rl.model.preview_loss import PreviewDraw
from fbs_rl.training.batches import MicroBatch
from fbs_rl.training.schedule import StepPlan
from fbs_rl.types import LossCounts, LossScope

PARTS = ("lm", "preview", "window", "chunk", "consistency", "gate", "distill", "imitation")


class StepSums:
    """Collects what the calls of one rank report; stays on the device until `vector` is read."""

    def __init__(self, config: FBSConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.layers = config.layer_count
        self.windows = len(config.preview_layers)
        self.parts = torch.zeros(len(PARTS) + 1, dtype=torch.float64, device=device)
        self.rate_L = torch.zeros(self.layers, dtype=torch.float64, device=device)
        self.skip_L = torch.zeros(self.layers, dtype=torch.float64, device=device)
        self.window_P = torch.zeros(self.windows, dtype=torch.float64, device=device)
        self.entropy = torch.zeros(1, dtype=torch.float64, device=device)
        self.tokens = 0
        self.seen: set[str] = set()

    @torch.no_grad()
    def add(self, out: Any, batch: MicroBatch) -> None:
        """One call's shares of the step."""
        report = out.loss_report
        self.parts[-1] += report.total
        for index, name in enumerate(PARTS):
            if name in report.parts:
                self.seen.add(name)
                self.parts[index] += report.parts[name]
        for sums, found in (
            (self.rate_L, report.rate_sum_L),
            (self.window_P, report.window_sum_P),
            (self.entropy, report.entropy_sum),
        ):
            if found is not None:
                sums += found
        self.skip_L += (out.skip & batch.gated_BT).sum((1, 2))
        self.tokens += batch.tokens

    def vector(self) -> Tensor:
        """Everything as one vector, to be summed over ranks."""
        tokens = torch.tensor([self.tokens], dtype=torch.float64, device=self.device)
        pieces = (self.parts, self.rate_L, self.skip_L, self.window_P, self.entropy, tokens)
        return torch.cat(pieces)

    def _cut(self, totals: Tensor) -> tuple[Tensor, ...]:
        sizes = [len(PARTS) + 1, self.layers, self.layers, self.windows, 1, 1]
        return totals.split(sizes)

    def means(self, totals: Tensor, counts: LossCounts) -> tuple[Tensor | None, Tensor | None]:
        """(mean rate per layer, mean window per PAW layer) of the step, which the next step linearises at."""
        _, rate_L, _, window_P, _, _ = self._cut(totals)
        return (
            rate_L / counts.gated if counts.gated and self.config.gate else None,
            window_P / counts.window if counts.window and self.windows else None,
        )

    def figures(self, totals: Tensor, scope: LossScope, plan: StepPlan) -> dict[str, Any]:
        """By name. The loss is the step's own: squares of means are taken of the step's means.

        scope: what the step's calls were given; the shares they report are linearised at its means.
        """
        parts, rate_L, skip_L, window_P, entropy, tokens = self._cut(totals)
        counts = scope.counts
        values = {name: float(parts[i]) for i, name in enumerate(PARTS) if name in self.seen}
        figures: dict[str, Any] = {}
        gated = max(counts.gated, 1)
        if "gate" in values:
            mean_entropy = float(entropy) / (gated * self.layers)
            penalty = float(
                rate_penalty(
                    rate_L / gated, None, True, plan.skip_target, self.config.loss_gate_ceiling
                )
            )
            if counts.gated:
                values["gate"] = penalty - self.config.loss_gate_entropy * mean_entropy
            figures |= {
                "gate/skip_ratio": float(skip_L.sum()) / (gated * self.layers),
                "gate/rate": float(rate_L.mean()) / gated,
                "gate/target": plan.skip_target,
                "gate/entropy": mean_entropy,
                "gate/tau": plan.tau,
                "gate/temperature": plan.gate_temperature,
            }
            figures |= {f"gate/layer_{i:02d}": float(s) / gated for i, s in enumerate(skip_L)}
        if "window" in values and counts.window:
            mean_P = window_P / counts.window
            drift_P, linear_P = self._window_drift(mean_P, scope)
            drawn = list(PreviewDraw.of(self.config, plan.step).taps)
            values["window"] += float((drift_P - linear_P)[drawn].mean())
            figures["preview/window"] = float(mean_P.mean())
            figures["preview/window_drift"] = float(drift_P.mean())
        figures |= {f"loss/{name}": value for name, value in values.items()}
        total = float(parts[-1])
        return {
            "train/loss": values["lm"],
            "train/objective": self._objective(values, plan),
            **figures,
            "train/phase": str(plan.phase),
            "train/tokens": float(tokens),
            "train/finite": math.isfinite(total),
        }

    def _window_drift(self, mean_P: Tensor, scope: LossScope) -> tuple[Tensor, Tensor]:
        """(the penalty on the step's mean window, what the calls added up to instead), per PAW layer."""
        horizon, frac = self.config.paw_horizon, self.config.paw_window_mean_frac
        share_P = mean_P / horizon
        before_P = None if scope.window_P is None else scope.window_P / horizon
        return (
            window_drift(share_P, None, True, frac),
            window_drift(share_P, before_P, False, frac),
        )

    def _objective(self, values: dict[str, float], plan: StepPlan) -> float:
        weights = {name: getattr(self.config, f"loss_{name}") for name in PARTS if name != "lm"}
        weights["preview"] *= plan.preview_scale
        return values["lm"] + sum(weights[n] * v for n, v in values.items() if n != "lm")
