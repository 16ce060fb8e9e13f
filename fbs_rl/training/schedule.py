"""What changes from step to step, each a pure function of the step (SPEC 2.2, 4.7, 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fbs_rl.training.settings import OptimizerSettings, PhaseSettings
from fbs_rl.types import GateMode


class Phase(StrEnum):
    OBSERVE = "1a"  # every layer runs; gates are only observed
    GATED = "1b"  # gates act


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How step `step` (0-based) is trained."""

    step: int
    phase: Phase
    mode: GateMode
    trains: str
    tau: float
    gate_temperature: float
    window_temperature: float
    skip_target: float
    preview_scale: float
    force_cross_entropy: bool
    lr_scale: float


def plan_step(step: int, phases: PhaseSettings, optimizer: OptimizerSettings) -> StepPlan:
    """The plan of one step."""
    observed, total = phases.observed_steps, phases.steps
    gated = step >= observed
    # Progress in phase 1b counts the step being taken, so that its last step is at the end of every ramp.
    within = (step + 1 - observed) / max(total - observed, 1) if gated else 0.0
    through = (step + 1) / total
    ramp = min(within / phases.skip_ramp_frac, 1.0) if phases.skip_ramp_frac else 1.0
    rise = phases.skip_target - phases.skip_target_start
    hardened = gated and step >= total - round(phases.harden_frac * (total - observed))
    warm_steps = phases.preview_warmup_frac * total
    return StepPlan(
        step=step,
        phase=Phase.GATED if gated else Phase.OBSERVE,
        mode=(GateMode.THRESHOLD if hardened else GateMode(phases.gates))
        if gated
        else GateMode.DENSE,
        trains=phases.train_gated if gated else phases.train,
        tau=0.5 if hardened else _between(phases.tau_start, phases.tau_end, within),
        gate_temperature=1.0
        if hardened
        else _between(phases.gate_temperature_start, phases.gate_temperature_end, within),
        window_temperature=_between(
            phases.window_temperature_start, phases.window_temperature_end, through
        ),
        skip_target=phases.skip_target_start + (rise * ramp if gated else 0.0),
        preview_scale=min((step + 1) / warm_steps, 1.0) if warm_steps else 1.0,
        force_cross_entropy=step < phases.cross_entropy_steps,
        lr_scale=lr_scale(step, total, optimizer),
    )


def lr_scale(step: int, total: int, optimizer: OptimizerSettings) -> float:
    """Factor on every learning rate: linear warm-up to 1, then a cosine down to lr_final_frac."""
    warmup = round(optimizer.warmup_frac * total)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - 1 - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optimizer.lr_final_frac + (1 - optimizer.lr_final_frac) * cosine


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
