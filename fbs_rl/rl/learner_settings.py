"""LearnerSettings: everything that the PPO learner can be told (SPEC 8.5), and the paper's own choices as a preset."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fbs_rl.gate_bundle import GateParts
from fbs_rl.rl.advantages import AdvantageSettings, Baseline
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.ppo_loss import PPOLossSettings
from fbs_rl.rl.reward import RewardSettings
from fbs_rl.setting_bounds import (
    require_above_zero,
    require_choice,
    require_not_negative,
    require_share,
)

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "trains": "gates+paw",
        "compute_credit": "sampled",
        "target_kl": None,
        "temperature_end": 1.0,
        "reward": {"quality": "gold"},
        "advantages": {"credit": "episode", "baseline": "critic"},
    },
}
"""Trees for fbs_rl.config.from_tree: they say only what differs from the defaults."""


class Trains(StrEnum):
    """Which parameters PPO changes.

    The dense pass holds PAW's injected vector, and the window predictor moves it: only with GATES does the dense
    reference provably stay as it is. SPEC's default, the window predictor with the vector held fixed, would
    need a second predictor in the model and in every engine.
    """

    GATES = "gates"  # Skip-Gates, their projection of the preview (W_2) included
    GATES_AND_WINDOW = "gates+window"  # and PAW's window predictors
    GATES_AND_PAW = "gates+paw"  # and all the rest of PAW


class ComputeCredit(StrEnum):
    """How gates are paid for saved compute."""

    SAMPLED = "sampled"  # as a part of the reward of sampled actions
    ANALYTIC = "analytic"  # by its exact gradient; rewards then hold quality alone


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchLimits:
    """How far the learner's numbers may lie from the rollout engine's when a run starts.

    They hold for bf16 engines; in float32 both agree to about 1e-5.
    """

    tokens: int = 64
    """Fewest gate columns to compare."""
    logp_max: float = 0.5
    """Largest |Δ log p_b| of one decision, nats."""
    kl: float = 1e-2
    """Mean KL(p_b of the rollout ‖ p_b of the learner) of a decision, nats."""
    flip_frac: float = 0.02
    """Share of decisions that the same noise would draw differently."""

    def __post_init__(self) -> None:
        require_above_zero("self_test", self, "tokens")
        require_not_negative("self_test", self, "logp_max", "kl", "flip_frac")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseLimits:
    """When a run is given up: a gate that always does the same, or one far from where it started."""

    prob_low: float = 0.005
    prob_high: float = 0.995
    patience: int = 50
    """Updates in a row with a layer's mean p outside the two."""
    kl_max: float = 0.5
    """Mean KL to the reference gate, nats."""

    def __post_init__(self) -> None:
        if not 0 <= self.prob_low < self.prob_high <= 1:
            raise ValueError(
                f"collapse.prob_low is {self.prob_low} and collapse.prob_high {self.prob_high}; "
                f"give two numbers in [0, 1], the lower first"
            )
        require_above_zero("collapse", self, "patience", "kl_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """Where and in which numbers the learner works. Moments and weights that train are float32 always."""

    device: str = "auto"
    """cpu, cuda or auto (cuda where there is a GPU)."""
    precision: str = "auto"
    """Of the model: auto (fp32 on CPUs, bf16 on GPUs), bf16 or fp32."""
    attention: str = "sdpa"
    threads: int = 1
    """Torch threads; on CPU, results are equal to the bit only between runs with the same number."""
    gradient_checkpointing: bool = False
    """Saves memory where gradients pass the backbone (trains gates+window or gates+paw)."""
    gate_views_gib: float = 4
    """Where gates alone train, what they read in an update is kept, up to this size, instead of running the model anew
    for the reference and in every epoch; 0: never."""
    deadline_s: float = 1800
    """Longest wait of one rank for another."""

    def __post_init__(self) -> None:
        choices = {
            "device": ("auto", "cpu", "cuda"),
            "precision": ("auto", "bf16", "fp32"),
            "attention": ("sdpa", "eager"),
        }
        require_choice("runtime", self, choices)
        require_above_zero("runtime", self, "threads", "deadline_s")
        require_not_negative("runtime", self, "gate_views_gib")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """One update: the episodes of one batch, `epochs` times in `minibatches` optimizer steps."""

    updates: int = 125
    """Of the whole run; what is annealed is annealed over them."""
    trains: Trains = Trains.GATES
    never_skip: tuple[int, ...] = ()
    """Layers that always run, beyond the model's own; rollouts must be made with the same."""
    lr_gates: float = 1e-3
    """The rate that was measured on SmolLM2-135M (RESULTS.md)."""
    lr_paw: float = 1e-5
    """Of PAW and of the gates' projection of the preview."""
    lr_value: float = 1e-3
    """Of the value head."""
    lr_final_frac: float = 1.0
    """Learning rates fall linearly to this share of themselves."""
    epochs: int = 4
    minibatches: int = 4
    micro_tokens: int = 8192
    """Tokens that a rank replays at once, prompts and padding included; one segment may have more."""
    grad_clip: float = 1.0
    target_kl: float | None = 0.02
    """No further epoch once the mean of ppo/approx_kl over an epoch passes this; null: never stop early."""
    compute_credit: ComputeCredit = ComputeCredit.ANALYTIC
    entropy_final_frac: float = 0.0
    """The entropy bonus falls linearly to this share of itself."""
    temperature_end: float = 0.5
    """The policy's temperature moves to this at the end, so that gates decide before τ does."""
    temperature_frac: float = 0.3
    """Share of the updates over which it does."""
    curriculum_frac: float = 0.0
    """Share of the updates over which the free layers grow from the middle third to all; 0: all from the start."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    advantages: AdvantageSettings = field(default_factory=AdvantageSettings)
    loss: PPOLossSettings = field(default_factory=PPOLossSettings)
    policy: GatePolicy = field(default_factory=GatePolicy)
    """What decisions are drawn with at the start."""
    self_test: MismatchLimits = field(default_factory=MismatchLimits)
    collapse: CollapseLimits = field(default_factory=CollapseLimits)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)

    def __post_init__(self) -> None:
        require_above_zero(
            "", self, "updates", "epochs", "minibatches", "micro_tokens", "grad_clip", "temperature_end",
        )  # fmt: skip
        for name in ("lr_gates", "lr_paw", "lr_value"):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"{name} is {rate}; give 0 or more")
        require_share(
            "", self, "lr_final_frac", "entropy_final_frac", "temperature_frac", "curriculum_frac"
        )
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(
                f"target_kl is {self.target_kl}; give a number above 0, or null for no early stop"
            )
        if self.lr_gates == 0 and (self.trains is Trains.GATES or self.lr_paw == 0):
            raise ValueError("the learning rates are 0, so nothing would train; set lr_gates")

    @property
    def bundle_parts(self) -> GateParts:
        """The parts that a receiver of gate bundles must let in."""
        return GateParts.GATES if self.trains is Trains.GATES else GateParts.GATES_AND_PAW

    @property
    def dense_is_fixed(self) -> bool:
        """Whether the dense pass stays the same; if not, dense continuations and NLLs hold for one version only."""
        return self.trains is Trains.GATES

    @property
    def has_critic(self) -> bool:
        return self.advantages.baseline is Baseline.CRITIC
