"""What changes from update to update, each a pure function of the update's number (SPEC 8.5)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.ppo_loss import deciding_layers


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """How update `step` (0-based) is sampled and trained.

    policy, never_skip: rollouts of this update must be drawn with exactly these; never_skip is sorted. deciding:
    layers that take a decision, one for each gate block.
    """

    step: int
    policy: GatePolicy
    never_skip: tuple[int, ...]
    deciding: tuple[int, ...]
    entropy_scale: float
    lr_scale: float


def plan_update(step: int, settings: LearnerSettings, config: FBSConfig) -> UpdatePlan:
    """The plan of one update. Raises ValueError if no layer may skip in it."""
    through = min(step / max(settings.updates - 1, 1), 1.0)
    never_skip = sorted(
        config.forced_layers(settings.never_skip) | _held_back(step, settings, config.layer_count)
    )
    deciding = deciding_layers(config.layer_count, config.gate_block, never_skip)
    if not deciding:
        raise ValueError(
            f"no layer may skip in update {step}: never_skip names all {config.layer_count}; name fewer"
        )
    return UpdatePlan(
        step=step,
        policy=replace(settings.policy, temperature=_temperature(through, settings)),
        never_skip=tuple(never_skip),
        deciding=deciding,
        entropy_scale=1 + (settings.entropy_final_frac - 1) * through,
        lr_scale=1 + (settings.lr_final_frac - 1) * through,
    )


def _temperature(through: float, settings: LearnerSettings) -> float:
    start, share = settings.policy.temperature, settings.temperature_frac
    if share == 0:
        return start
    progress = max(through - (1 - share), 0.0) / share
    return start + (settings.temperature_end - start) * progress


def _held_back(step: int, settings: LearnerSettings, layer_count: int) -> set[int]:
    """Layers outside the free range, which grows from the middle third over the curriculum."""
    ramp = settings.curriculum_frac * settings.updates
    if step >= ramp:
        return set()
    margin = round(layer_count / 3 * (1 - step / ramp))
    return {i for i in range(layer_count) if not margin <= i < layer_count - margin}
