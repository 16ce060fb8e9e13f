"""The Stage-1 objective (SPEC 5): each loss a function of the pass and the labels, and their weighted sum.

Every loss is a mean over what it applies to and zero where it applies to nothing. Weights are the
configuration's `loss_*` fields.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fbs_rl.model.chunk_loss import boundary_loss, consistency_loss
from fbs_rl.model.preview import PreviewHead
from fbs_rl.model.sequence_pass import PassResult
from fbs_rl.types import IGNORED_LABEL, ChunkLabels, GateMode, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel

_SCORED_TOKENS = (
    1024  # the [tokens, preview vocabulary] logits of a horizon exist this many tokens at a time
)


@dataclass(slots=True)
class Supervision:
    """What the losses are computed against.

    labels_BT: token ids, IGNORED_LABEL where none (not shifted). dense_logits_BTV: what L_distill pulls
    towards. draw: chooses the PAW layers that are scored. skip_target: ρ* over all layers.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    mode: GateMode
    skip_target: float
    document_BT: Tensor | None = None
    chunk_labels: ChunkLabels | None = None
    dense_logits_BTV: Tensor | None = None
    draw: int = 0


def compute_losses(
    model: FBSModel, result: PassResult, logits_BTV: Tensor, target: Supervision
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted sum, parts): lm, preview, window, chunk, consistency, gate, distill, those that apply."""
    config = model.config
    parts = {"lm": language_model_loss(logits_BTV, target.labels_BT, target.document_BT)}
    weights = {"lm": 1.0}
    if model.preview is not None and result.taps.previews:
        parts["preview"], parts["window"] = _preview_losses(model, result, target)
        weights |= {"preview": config.loss_preview, "window": config.loss_window}
    if result.taps.chunks is not None and model.boundary is not None:
        parts["chunk"] = boundary_loss(config, result.taps.chunks, target.chunk_labels)
        parts["consistency"] = consistency_loss(model, result.taps)
        weights |= {"chunk": config.loss_chunk, "consistency": config.loss_consistency}
    if config.gate and result.taps.gated_BT is not None:
        parts["gate"] = gate_loss(
            _rates(result, target.mode), result.taps.gated_BT, target.skip_target
        )
        weights["gate"] = config.loss_gate
    if target.dense_logits_BTV is not None:
        parts["distill"] = distillation_loss(
            logits_BTV, target.dense_logits_BTV, result.taps.gated_BT
        )
        weights["distill"] = config.loss_distill
    total = sum(
        (weights[name] * part for name, part in parts.items()),
        start=torch.zeros((), device=logits_BTV.device),
    )
    return total, parts


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def language_model_loss(
    logits_BTV: Tensor, labels_BT: Tensor, document_BT: Tensor | None = None
) -> Tensor:
    """L_LM: mean cross entropy in nats of each labelled token given those before it in its document."""
    target_BT = labels_BT[:, 1:]
    if document_BT is not None:
        target_BT = target_BT.masked_fill(document_BT[:, 1:] != document_BT[:, :-1], IGNORED_LABEL)
    summed = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        target_BT.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    return summed / (target_BT != IGNORED_LABEL).sum().clamp_min(1)


def distillation_loss(
    logits_BTV: Tensor, dense_logits_BTV: Tensor, gated_BT: Tensor | None
) -> Tensor:
    """KL(p_dense || p_gated) in nats, mean over the tokens at which gates act."""
    log_gated, log_dense = (
        logits_BTV.float().log_softmax(-1),
        dense_logits_BTV.detach().float().log_softmax(-1),
    )
    kl_BT = F.kl_div(log_gated, log_dense, log_target=True, reduction="none").sum(-1)
    return masked_mean(
        kl_BT, torch.ones_like(kl_BT, dtype=torch.bool) if gated_BT is None else gated_BT
    )


# --- preview ------------------------------------------------------------------------------------------


def _preview_losses(
    model: FBSModel, result: PassResult, target: Supervision
) -> tuple[Tensor, Tensor]:
    """(L_preview, L_win), means over the PAW layers drawn for this batch."""
    assert model.preview is not None
    taps = result.taps.previews
    drawn = random.Random(target.draw).sample(taps, min(model.config.loss_preview_taps, len(taps)))
    ids_BTK, known_BTK = horizon_targets(
        target.input_ids_BT, model.config.paw_horizon, result.taps.valid_BT, target.document_BT
    )
    reduced_NR = model.preview.reduced_embedding(model.embed_tokens.weight)
    preview, window = [], []
    for tap in drawn:
        ce_BTK = preview_cross_entropy(model.preview, tap, reduced_NR, ids_BTK, known_BTK)
        preview.append(preview_loss(ce_BTK, tap.inclusion_BTK, known_BTK))
        window.append(
            window_loss(
                ce_BTK,
                tap,
                known_BTK,
                model.config.loss_window_nats,
                model.config.paw_window_mean_frac,
            )
        )
    return torch.stack(preview).mean(), torch.stack(window).mean()


def horizon_targets(
    ids_BT: Tensor, horizons: int, valid_BT: Tensor | None = None, document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_{t+h} [B, T, K], whether it exists in the same document) for h = 1..K."""
    length = ids_BT.shape[1]
    index_TK = torch.arange(length, device=ids_BT.device)[:, None] + torch.arange(
        1, horizons + 1, device=ids_BT.device
    )
    inside_TK = index_TK < length
    index_TK = index_TK.clamp_max(length - 1)
    known_BTK = inside_TK.expand(len(ids_BT), -1, -1)
    if valid_BT is not None:
        known_BTK = known_BTK & valid_BT[:, index_TK] & valid_BT.unsqueeze(-1)
    if document_BT is not None:
        known_BTK = known_BTK & (document_BT[:, index_TK] == document_BT.unsqueeze(-1))
    return ids_BT[:, index_TK], known_BTK


def preview_cross_entropy(
    head: PreviewHead, tap: PreviewTap, reduced_NR: Tensor, ids_BTK: Tensor, known_BTK: Tensor
) -> Tensor:
    """CE_{t,h} [B, T, K] in nats over the preview vocabulary and UNK; 0 where there is no target."""
    vocabulary = torch.cat((reduced_NR, head.unk_R.unsqueeze(0)))
    classes_BTK = _preview_classes(head, ids_BTK).masked_fill(~known_BTK, IGNORED_LABEL)
    tokens = tap.query_BTR.flatten(0, 1)
    columns = []
    for horizon in range(head.horizons):
        query = F.linear(tokens, head.horizon_maps[horizon])
        wanted = classes_BTK[..., horizon].flatten()
        parts = [
            checkpoint(_class_cross_entropy, q, vocabulary, w, use_reentrant=False)
            for q, w in zip(query.split(_SCORED_TOKENS), wanted.split(_SCORED_TOKENS), strict=True)
        ]
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=-1).view(ids_BTK.shape)


def _class_cross_entropy(query: Tensor, vocabulary: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(query, vocabulary).float(), wanted, ignore_index=IGNORED_LABEL, reduction="none"
    )


def _preview_classes(head: PreviewHead, ids: Tensor) -> Tensor:
    """Index in the preview vocabulary, or its size (UNK) for tokens outside it."""
    position = torch.searchsorted(head.token_ids_N, ids).clamp_max(len(head.token_ids_N) - 1)
    return torch.where(head.token_ids_N[position] == ids, position, len(head.token_ids_N))


def preview_loss(ce_BTK: Tensor, inclusion_BTK: Tensor, known_BTK: Tensor) -> Tensor:
    """L_preview (SPEC 2.7): mean over tokens of Σ_h sg(α)·CE / Σ_h sg(α), over horizons with a target.

    α is detached: with its gradient the window would shrink to where prediction is easy.
    """
    weight_BTK = inclusion_BTK.detach() * known_BTK
    weight_BT = weight_BTK.sum(-1)
    return masked_mean((weight_BTK * ce_BTK).sum(-1) / weight_BT.clamp_min(1e-6), weight_BT > 1e-6)


def window_target(ce_BTK: Tensor, known_BTK: Tensor, nats: float) -> Tensor:
    """k* = clip(1 + max{h : CE_{t,h'} <= nats for all h' <= h}, 1, K): one past the readable run (SPEC 2.8)."""
    readable_BTK = (ce_BTK.detach() <= nats) & known_BTK
    run_BT = readable_BTK.long().cumprod(-1).sum(-1)
    return (1 + run_BT).clamp_max(ce_BTK.shape[-1])


def window_loss(
    ce_BTK: Tensor, tap: PreviewTap, known_BTK: Tensor, nats: float, mean_frac: float
) -> Tensor:
    """L_win = Huber(ŵ − k*) + (mean ŵ/K − mean_frac)², over tokens all of whose horizons are known."""
    full_BT = known_BTK.all(-1)
    target_BT = window_target(ce_BTK, known_BTK, nats).float()
    huber = masked_mean(F.huber_loss(tap.window_BT, target_BT, reduction="none"), full_BT)
    mean_window = masked_mean(tap.window_BT, full_BT) / ce_BTK.shape[-1]
    return huber + full_BT.any() * (mean_window - mean_frac) ** 2


# --- gate ---------------------------------------------------------------------------------------------


def _rates(result: PassResult, mode: GateMode) -> Tensor:
    """What stands for the skip rate, with gradient: z̃ under threshold gates, the probability otherwise."""
    soft = result.taps.soft_skip_LBT
    return soft if mode is GateMode.THRESHOLD and soft is not None else result.prob_LBT


def gate_loss(rate_LBT: Tensor, gated_BT: Tensor, target: float) -> Tensor:
    """L_gate = (mean p − ρ*)² + 0.1·Σ_l relu(mean_t p^l − 0.9)² − 0.01·mean H(p), over gated tokens."""
    count = gated_BT.sum().clamp_min(1)
    rate_L = (rate_LBT * gated_BT).sum((1, 2)) / count
    prob = rate_LBT.clamp(1e-6, 1 - 1e-6)
    entropy = -(prob * prob.log() + (1 - prob) * (1 - prob).log())
    mean_entropy = (entropy * gated_BT).sum() / (count * len(rate_LBT))
    loss = (
        (rate_L.mean() - target) ** 2
        + 0.1 * F.relu(rate_L - 0.9).square().sum()
        - 0.01 * mean_entropy
    )
    return gated_BT.any() * loss
