"""The PPO objective for Bernoulli gates (SPEC 8.4, 8.5): replayed actions in, a loss and metrics out.

The policy is not the gate's p itself but p_b, made of p by a temperature and by bounds (GatePolicy). Whoever
samples must sample from p_b, and whoever stores log-probabilities must store those of p_b, taken from the
same pass and numerics as here; then replaying an episode before any update gives ratios of exactly 1.

Shape letters: L layers, B rows, T gate columns. A decision is one (layer, row, column) at which a gate chose.
A unit is what one ratio is taken of: a decision, a column or a row.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fbs_rl.rl.gate_policy import P_MARGIN, GatePolicy

_LOG_RATIO_LIMIT = 20.0
"""exp() of more overflows in products; with the bounds 0.02 and 0.98 one gate cannot pass 3.9."""


class Ratio(StrEnum):
    """What one importance ratio is taken of."""

    GATE = "gate"  # each decision
    TOKEN = "token"  # a column: the product over its layers
    JOINT = "joint"  # a row: the product over all of its decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOLossSettings:
    """clip: of the ratio, 1 ± clip. Coefficients weigh means over decisions (entropy, KL) or columns (value)."""

    clip: float = 0.2
    ratio: Ratio = Ratio.GATE
    entropy_coef: float = 1e-3
    kl_coef: float = 0.05
    value_coef: float = 0.5
    value_clip: float | None = None
    """How far V may move from the rollout's V, in reward units; None: freely. Rewards are about 0.03 here."""

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is {self.clip}; it must lie in (0, 1), such as 0.2")
        for name in ("entropy_coef", "kl_coef", "value_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.value_clip is not None and not self.value_clip > 0:
            raise ValueError(
                f"value_clip is {self.value_clip}; give a number above 0, or null for no clipping"
            )


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Over how many items the means of one optimizer step run; counts of its calls add up."""

    units: int
    decisions: int
    columns: int

    @classmethod
    def of(cls, decides_LBT: Tensor, ratio: Ratio) -> StepCounts:
        decisions, columns = int(decides_LBT.sum()), int(decides_LBT.any(0).sum())
        rows = int(decides_LBT.any(2).any(0).sum())
        units = {Ratio.GATE: decisions, Ratio.TOKEN: columns, Ratio.JOINT: rows}[ratio]
        return cls(units, decisions, columns)

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(
            self.units + other.units,
            self.decisions + other.decisions,
            self.columns + other.columns,
        )


@dataclass(frozen=True, slots=True)
class ValueInputs:
    """value_BT: V now. old_value_BT: when the rollout was made. target_BT: its return."""

    value_BT: Tensor
    old_value_BT: Tensor
    target_BT: Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One call's share of an optimizer step.

    prob_LBT: the gate's p under replay, float32, with its gradient; not p_b. skip_LBT: the actions z, bool.
    old_logp_LBT: log p_b(z) when the rollout was made. decides_LBT: where a decision was taken
    (`decision_mask`); whatever the others hold, NaN included, is ignored. advantage_BT: of each column.
    reference_LBT: p of the gate that the KL term pulls towards. skip_gain_LBT: what each skip adds to R
    through compute, on the advantages' scale; with it, advantages must hold the quality part alone. counts: of the
    whole step; None: this call is the step.
    """

    prob_LBT: Tensor
    skip_LBT: Tensor
    old_logp_LBT: Tensor
    decides_LBT: Tensor
    advantage_BT: Tensor
    reference_LBT: Tensor | None = None
    skip_gain_LBT: Tensor | None = None
    values: ValueInputs | None = None
    counts: StepCounts | None = None

    def __post_init__(self) -> None:
        shape = self.prob_LBT.shape
        for name in ("skip_LBT", "old_logp_LBT", "decides_LBT", "reference_LBT", "skip_gain_LBT"):
            tensor = getattr(self, name)
            assert tensor is None or tensor.shape == shape, (name, tuple(tensor.shape))
        assert len(shape) == 3 and self.advantage_BT.shape == shape[1:]
        assert self.skip_LBT.dtype == self.decides_LBT.dtype == torch.bool


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss: to be minimised. metrics: by name, detached; those of a step's calls add up, except ppo/ratio_max."""

    loss: Tensor
    metrics: dict[str, Tensor]


def deciding_layers(layer_count: int, gate_block: int, forced: Collection[int]) -> tuple[int, ...]:
    """One layer for each decision: the first of each gate block that may be skipped, ascending.

    Its p and z are the block's. forced: layers that always run; the first layer of a block may be one of them.
    """
    blocks = (
        [layer for layer in range(start, min(start + gate_block, layer_count)) if layer not in forced]
        for start in range(0, layer_count, gate_block)
    )  # fmt: skip
    return tuple(block[0] for block in blocks if block)


def decision_mask(layer_count: int, deciding: Collection[int], columns_BT: Tensor) -> Tensor:
    """Where decisions were taken, bool [L, B, T]. columns_BT: True at gate columns, False on padding and prompts."""
    decides_L = torch.zeros(layer_count, dtype=torch.bool, device=columns_BT.device)
    decides_L[list(deciding)] = True
    return decides_L.view(-1, 1, 1) & columns_BT.bool()


def log_probability(policy_prob: Tensor, skip: Tensor) -> Tensor:
    """log p_b(z): log p_b where z = 1, log(1 − p_b) where z = 0."""
    return torch.where(skip, policy_prob, 1 - policy_prob).log()


def gate_entropy(prob: Tensor) -> Tensor:
    """H(p), nats."""
    prob = prob.clamp(P_MARGIN, 1 - P_MARGIN)
    return -(prob * prob.log() + (1 - prob) * (1 - prob).log())


def gate_divergence(prob: Tensor, reference: Tensor) -> Tensor:
    """KL_Bern(p ‖ p_ref), nats."""
    prob = prob.clamp(P_MARGIN, 1 - P_MARGIN)
    reference = reference.detach().clamp(P_MARGIN, 1 - P_MARGIN)
    skips = prob * (prob.log() - reference.log())
    return skips + (1 - prob) * ((1 - prob).log() - (1 - reference).log())


def ppo_loss(
    inputs: LossInputs,
    settings: PPOLossSettings,
    policy: GatePolicy,
    entropy_scale: float = 1.0,
) -> LossOutputs:
    """−mean min(ρA, clip(ρ)A) − c_H·H(p) + c_KL·KL_Bern(p ‖ p_ref) + c_V·value loss.

    entropy_scale: factor on c_H, which training anneals. H and KL are of the gate's own p, before temperature
    and bounds: so they still have a gradient where the bounds hold.
    """
    decides_LBT = inputs.decides_LBT
    counts = inputs.counts or StepCounts.of(decides_LBT, settings.ratio)
    units, decisions = max(counts.units, 1), max(counts.decisions, 1)
    prob_LBT = torch.where(decides_LBT, inputs.prob_LBT.float(), 0.5)
    policy_LBT = policy.probability(prob_LBT)
    logp_LBT = log_probability(policy_LBT, inputs.skip_LBT)
    log_ratio_LBT = torch.where(decides_LBT, logp_LBT - inputs.old_logp_LBT, 0.0)
    log_ratio, advantage, counted = _by_unit(log_ratio_LBT, inputs, settings.ratio)
    ratio = log_ratio.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    gained = torch.where(counted, clipped_surrogate(ratio, advantage, settings.clip), 0.0)
    policy_loss = -gained.sum() / units
    if inputs.skip_gain_LBT is not None:
        gained_LBT = _expected_gain(policy_LBT, inputs, settings.clip)
        policy_loss = policy_loss - gained_LBT.sum() / units
    entropy = torch.where(decides_LBT, gate_entropy(prob_LBT), 0.0).sum() / decisions
    loss = policy_loss - settings.entropy_coef * entropy_scale * entropy
    metrics = {
        "ppo/policy_loss": policy_loss,
        "ppo/entropy": entropy,
        **_movement(log_ratio, ratio, counted, settings.clip, units),
        **_gate_metrics(inputs, policy_LBT, policy, decisions),
    }
    if inputs.reference_LBT is not None:
        reference_LBT = torch.where(decides_LBT, inputs.reference_LBT.float(), 0.5)
        metrics["ppo/kl_ref"] = gate_divergence(prob_LBT, reference_LBT).sum() / decisions
        loss = loss + settings.kl_coef * metrics["ppo/kl_ref"]
    if inputs.values is not None:
        errors_BT = value_errors(inputs.values, settings.value_clip)
        errors_BT = torch.where(decides_LBT.any(0), errors_BT, 0.0)
        metrics["value/loss"] = errors_BT.sum() / max(counts.columns, 1)
        loss = loss + settings.value_coef * metrics["value/loss"]
    metrics["ppo/loss"] = loss
    return LossOutputs(loss, {name: value.detach() for name, value in metrics.items()})


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ρA, clip(ρ, 1 ± clip)A), to be maximised (Schulman et al. 2017, eq 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_errors(values: ValueInputs, clip: float | None) -> Tensor:
    """½(V − G)², or with a clip the larger of that and ½(V_old + clip(V − V_old, ±clip) − G)²."""
    error_BT = (values.value_BT - values.target_BT) ** 2
    if clip is not None:
        moved_BT = (values.value_BT - values.old_value_BT).clamp(-clip, clip)
        error_BT = error_BT.maximum((values.old_value_BT + moved_BT - values.target_BT) ** 2)
    return 0.5 * error_BT


def _by_unit(
    log_ratio_LBT: Tensor, inputs: LossInputs, ratio: Ratio
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratio and advantage of each unit, and which units count."""
    advantage_BT, decides_LBT = inputs.advantage_BT.float(), inputs.decides_LBT
    if ratio is Ratio.GATE:
        return log_ratio_LBT, advantage_BT.expand_as(log_ratio_LBT), decides_LBT
    decides_BT = decides_LBT.any(0)
    if ratio is Ratio.TOKEN:
        return log_ratio_LBT.sum(0), advantage_BT, decides_BT
    # A row has one ratio and so one advantage: the mean of its columns'.
    held_BT = torch.where(decides_BT, advantage_BT, 0.0)
    advantage_B = held_BT.sum(1) / decides_BT.sum(1).clamp_min(1)
    return log_ratio_LBT.sum((0, 2)), advantage_B, decides_BT.any(1)


def _expected_gain(policy_LBT: Tensor, inputs: LossInputs, clip: float) -> Tensor:
    """The compute part of the surrogate in expectation over z, instead of for the sampled z: [L, B, T].

    Skipping is worth c more than running, so against the expectation c·p_old the two actions have advantages
    c(1 − p_old) and −c·p_old. E ρA over both is c(p_b − p_old): its gradient is c·∂p_b. Each action's term is
    clipped like any other, so the analytic part does not push on where the sampled one has stopped.
    """
    assert inputs.skip_gain_LBT is not None
    gain_LBT = torch.where(inputs.decides_LBT, inputs.skip_gain_LBT.float(), 0.0)
    acted_LBT = torch.where(inputs.decides_LBT, inputs.old_logp_LBT.detach(), -1.0).exp()
    old_LBT = torch.where(inputs.skip_LBT, acted_LBT, 1 - acted_LBT)
    skips_LBT = clipped_surrogate(policy_LBT / old_LBT, gain_LBT * (1 - old_LBT), clip)
    runs_LBT = clipped_surrogate((1 - policy_LBT) / (1 - old_LBT), -gain_LBT * old_LBT, clip)
    return old_LBT * skips_LBT + (1 - old_LBT) * runs_LBT


@torch.no_grad()
def _movement(
    log_ratio: Tensor, ratio: Tensor, counted: Tensor, clip: float, units: int
) -> dict[str, Tensor]:
    """How far the policy has moved: KL(old ‖ new) as E[(ρ − 1) − log ρ], clipped share, extremes."""
    divergence = torch.where(counted, (ratio - 1) - log_ratio, 0.0)
    clipped = ((ratio - 1).abs() > clip) & counted
    largest = torch.where(counted, log_ratio.abs(), 0.0)
    return {
        "ppo/approx_kl": divergence.sum() / units,
        "ppo/clip_frac": clipped.sum() / units,
        # Of ρ and 1/ρ; flattened, since an empty tensor has no maximum.
        "ppo/ratio_max": torch.cat((largest.flatten(), largest.new_zeros(1))).max().exp(),
    }


@torch.no_grad()
def _gate_metrics(
    inputs: LossInputs, policy_LBT: Tensor, policy: GatePolicy, decisions: int
) -> dict[str, Tensor]:
    """Skip rates of decisions, not of layers; and the share whose p_b sits at a bound."""
    decides_LBT = inputs.decides_LBT
    bound_LBT = (policy_LBT <= policy.low) | (policy_LBT >= policy.high)
    return {
        "gate/skip_rate": (inputs.skip_LBT & decides_LBT).sum() / decisions,
        "gate/expected_skip_rate": torch.where(decides_LBT, policy_LBT, 0.0).sum() / decisions,
        "gate/at_bound_frac": (bound_LBT & decides_LBT).sum() / decisions,
    }
