"""The Stage-1 objective (SPEC 5): the losses of a pass and their weighted sum.

Every loss is a mean over what it applies to and zero where it applies to nothing. Weights are the
configuration's `loss_*` fields. Over what the means run is the call's own affair, or that of the
optimizer step the call is a part of (LossScope): then the same step gives the same gradient however
it is cut into calls, accumulation steps and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.chunk_loss import boundary_loss_rows, consistency_loss_rows
from fbs_rl.model.preview_loss import (
    HorizonTargets,
    PreviewDraw,
    horizon_targets,
    preview_cross_entropy,
    preview_loss_sum,
    thin,
    window_error_sum,
)
from fbs_rl.model.sequence_pass import PassResult
from fbs_rl.model.vocabulary_loss import (
    cross_entropy_sum,
    divergence_sum,
    next_token_labels,
    weighted_losses,
)
from fbs_rl.types import (
    IGNORED_LABEL,
    ChunkLabels,
    DenseReference,
    GateMode,
    LossCounts,
    LossReport,
    LossScope,
)

if TYPE_CHECKING:
    from fbs_rl.model.configuration import FBSConfig
    from fbs_rl.model.modeling import FBSModel

_RATE_CEILING = 0.9


@dataclass(slots=True)
class Supervision:
    """What the losses are computed against.

    labels_BT: token ids, IGNORED_LABEL where none (not shifted). dense: what L_distill pulls towards.
    draw: chooses the previews that are scored. skip_target: ρ* over all layers. scope: the step that
    this call is a part of; None: it stands for itself.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    mode: GateMode
    skip_target: float
    document_BT: Tensor | None = None
    chunk_labels: ChunkLabels | None = None
    dense: DenseReference | None = None
    draw: int = 0
    scope: LossScope | None = None


def count_losses(
    config: FBSConfig,
    input_ids_BT: Tensor,
    labels_BT: Tensor,
    gated_BT: Tensor | None,
    valid_BT: Tensor | None = None,
    document_BT: Tensor | None = None,
    draw: int = 0,
) -> LossCounts:
    """Over how many items each loss of these rows is a mean; the counts of a step are the sums over its calls."""
    columns = PreviewDraw.of(config, draw).columns
    targets = horizon_targets(input_ids_BT, config.paw_horizon, valid_BT, document_BT, columns)
    sums = [
        (next_token_labels(labels_BT, document_BT) != IGNORED_LABEL).sum(),
        targets.scored_BT.sum(),
        targets.full_BT.sum(),
        labels_BT.new_zeros(()) if gated_BT is None else gated_BT.sum(),
    ]
    lm, preview, window, gated = torch.stack(sums).tolist()
    return LossCounts(lm, preview, window, gated, len(input_ids_BT))


def compute_losses(
    model: FBSModel, head_Vd: Tensor, result: PassResult, hidden_BTd: Tensor, target: Supervision
) -> LossReport:
    """Parts lm, preview, window, chunk, consistency, gate, distill, those that apply, and their weighted sum.

    hidden_BTd: final normed states. head_Vd: the output embedding.
    """
    config, taps = model.config, result.taps
    scope = target.scope or LossScope(
        count_losses(
            config,
            target.input_ids_BT,
            target.labels_BT,
            taps.gated_BT,
            taps.valid_BT,
            target.document_BT,
            target.draw,
        )
    )
    counts, whole = scope.counts, target.scope is None
    wanted_BT = next_token_labels(target.labels_BT, target.document_BT)
    report = _start_report(config, hidden_BTd, head_Vd, wanted_BT, target, taps.gated_BT, counts)
    if model.preview is not None and taps.previews:
        _add_previews(report, model, result, target, scope, whole)
    if taps.chunks is not None and model.boundary is not None:
        boundary_B = boundary_loss_rows(config, taps.chunks, target.chunk_labels)
        _add(report, "chunk", boundary_B.sum() / max(counts.rows, 1), config.loss_chunk)
        consistency_B = consistency_loss_rows(model, taps)
        part = consistency_B.sum() / max(counts.rows, 1)
        _add(report, "consistency", part, config.loss_consistency)
    if config.gate and taps.gated_BT is not None:
        _add_gate(report, config, result, target, scope, whole)
    if taps.miss_ABT is not None and taps.gated_BT is not None:
        part = (taps.miss_ABT.mean(0) * taps.gated_BT).sum() / max(counts.gated, 1)
        _add(report, "imitation", part, config.loss_imitation)
    return report


def _start_report(
    config: FBSConfig, hidden_BTd: Tensor, head_Vd: Tensor, wanted_BT: Tensor, target: Supervision,
    gated_BT: Tensor | None, counts: LossCounts,
) -> LossReport:  # fmt: skip
    """The report with what reads the whole vocabulary: lm and, with a dense reference, distill."""
    scales = 1 / max(counts.lm, 1), 1 / max(counts.gated, 1)
    if target.dense is None:
        lm = cross_entropy_sum(hidden_BTd, head_Vd, wanted_BT) * scales[0]
        return LossReport(lm, {"lm": lm}, counts)
    assert gated_BT is not None
    if hidden_BTd.is_cuda and torch.is_grad_enabled():
        weights = scales[0], config.loss_distill * scales[1]
        total, lm, distill = weighted_losses(
            hidden_BTd, head_Vd, wanted_BT, target.dense, gated_BT, weights
        )
        return LossReport(total, {"lm": lm * scales[0], "distill": distill * scales[1]}, counts)
    lm = cross_entropy_sum(hidden_BTd, head_Vd, wanted_BT) * scales[0]
    report = LossReport(lm, {"lm": lm}, counts)
    part = divergence_sum(hidden_BTd, head_Vd, target.dense, gated_BT) * scales[1]
    _add(report, "distill", part, config.loss_distill)
    return report


def _add(report: LossReport, name: str, part: Tensor, weight: float) -> None:
    report.parts[name] = part
    report.total = report.total + weight * part


# --- preview ------------------------------------------------------------------------------------------


def _add_previews(
    report: LossReport,
    model: FBSModel,
    result: PassResult,
    target: Supervision,
    scope: LossScope,
    whole: bool,
) -> None:
    """L_preview and L_win, means over the PAW layers and columns drawn for this step."""
    assert model.preview is not None
    config, previews = model.config, result.taps.previews
    draw = PreviewDraw.of(config, target.draw)
    wanted = horizon_targets(
        target.input_ids_BT,
        config.paw_horizon,
        result.taps.valid_BT,
        target.document_BT,
        draw.columns,
    )
    reduced_NR = model.preview.reduced_embedding(model.embed_tokens.weight)
    sums_P = _window_sums(result, wanted, draw)
    report.window_sum_P = sums_P.detach()
    shares_P = sums_P / (max(report.counts.window, 1) * config.paw_horizon)
    preview, window = [], []
    for index in draw.taps:
        tap = thin(previews[index], draw.columns)
        ce_BTK = preview_cross_entropy(model.preview, tap, reduced_NR, wanted)
        preview.append(preview_loss_sum(ce_BTK, tap.inclusion_BTK, wanted.known_BTK))
        error = window_error_sum(ce_BTK, tap.window_BT, wanted.known_BTK, config.loss_window_nats)
        means_P = None if scope.window_P is None else scope.window_P / config.paw_horizon
        drift = window_drift(shares_P, means_P, whole, config.paw_window_mean_frac)[index]
        window.append(error / max(report.counts.window, 1) + (report.counts.window > 0) * drift)
    part = torch.stack(preview).mean() / max(report.counts.preview, 1)
    _add(report, "preview", part, config.loss_preview * scope.preview_scale)
    _add(report, "window", torch.stack(window).mean(), config.loss_window)


def _window_sums(result: PassResult, wanted: HorizonTargets, draw: PreviewDraw) -> Tensor:
    windows = [tap.window_BT[:, draw.columns] for tap in result.taps.previews]
    return (torch.stack(windows) * wanted.full_BT).sum((1, 2))


def window_drift(
    share_P: Tensor, reference_P: Tensor | None, whole: bool, mean_frac: float
) -> Tensor:
    """(mean ŵ/K − mean_frac)² per PAW layer (SPEC 2.8); of a part of a step, linearised at `reference`."""
    if whole:
        return (share_P - mean_frac) ** 2
    if reference_P is None:
        return share_P * 0.0
    return 2 * (reference_P.to(share_P) - mean_frac) * share_P


# --- gate ---------------------------------------------------------------------------------------------


def _add_gate(
    report: LossReport,
    config: FBSConfig,
    result: PassResult,
    target: Supervision,
    scope: LossScope,
    whole: bool,
) -> None:
    """L_gate = (mean p − ρ*)² + c_1·Σ_l relu(mean_t p^l − 0.9)² − c_2·mean H(p), over gated tokens."""
    gated_BT, soft_LBT = result.taps.gated_BT, result.taps.soft_skip_LBT
    assert gated_BT is not None
    # What stands for the skip rate, with gradient: z̃ under threshold gates, the probability otherwise.
    threshold = target.mode is GateMode.THRESHOLD and soft_LBT is not None
    rate_LBT = soft_LBT if threshold and soft_LBT is not None else result.prob_LBT
    count = max(report.counts.gated, 1)
    sum_L = (rate_LBT * gated_BT).sum((1, 2))
    entropy = (binary_entropy(rate_LBT) * gated_BT).sum()
    report.rate_sum_L, report.entropy_sum = sum_L.detach(), entropy.detach()
    penalty = rate_penalty(
        sum_L / count, scope.rate_L, whole, target.skip_target, config.loss_gate_ceiling
    )
    part = penalty - config.loss_gate_entropy * entropy / (count * len(rate_LBT))
    _add(report, "gate", (report.counts.gated > 0) * part, config.loss_gate)


def binary_entropy(prob: Tensor) -> Tensor:
    """H(p) in nats, with a finite gradient at 0 and 1."""
    prob = prob.clamp(1e-6, 1 - 1e-6)
    return -(prob * prob.log() + (1 - prob) * (1 - prob).log())


def rate_penalty(
    rate_L: Tensor, reference_L: Tensor | None, whole: bool, target: float, ceiling: float = 0.1
) -> Tensor:
    """(mean rate − target)² + ceiling·Σ_l relu(rate_l − 0.9)²; of a part of a step, linearised at `reference`."""
    if whole:
        above = F.relu(rate_L - _RATE_CEILING).square().sum()
        return (rate_L.mean() - target) ** 2 + ceiling * above
    if reference_L is None:
        return rate_L.sum() * 0.0
    reference_L = reference_L.to(rate_L)
    slope_L = 2 * (reference_L.mean() - target) / len(reference_L)
    slope_L = slope_L + 2 * ceiling * F.relu(reference_L - _RATE_CEILING)
    return (slope_L * rate_L).sum()
