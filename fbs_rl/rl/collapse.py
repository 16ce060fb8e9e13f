"""Guards against gates that no longer decide (SPEC 8.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fbs_rl.rl.learner_settings import CollapseLimits


class CollapseError(RuntimeError):
    """A gate does the same whatever it sees, or the gates have run away; going on would not mend it."""


@dataclass(slots=True)
class CollapseGuard:
    """outside: by layer, updates in a row with a mean p outside the limits."""

    limits: CollapseLimits
    outside: dict[int, int] = field(default_factory=dict)

    def check(self, prob_by_layer: Mapping[int, float], kl_ref: float) -> None:
        """Look at one update. prob_by_layer: mean p of each layer that decides. Raises CollapseError."""
        limits = self.limits
        for layer, prob in prob_by_layer.items():
            inside = limits.prob_low <= prob <= limits.prob_high
            self.outside[layer] = 0 if inside else self.outside.get(layer, 0) + 1
            if self.outside[layer] >= limits.patience:
                raise CollapseError(
                    f"the gate of layer {layer} has skipped with a mean probability outside "
                    f"[{limits.prob_low:g}, {limits.prob_high:g}] for {self.outside[layer]} updates (now {prob:.4f}); "
                    f"go on from an earlier checkpoint with a smaller lr_gates, another beta / lam or a larger "
                    f"entropy_coef"
                )
        if kl_ref > limits.kl_max:
            raise CollapseError(
                f"the gates are {kl_ref:.3f} nats a decision from the reference, above {limits.kl_max:g}; "
                f"go on from an earlier checkpoint with a smaller lr_gates or a larger kl_coef"
            )
