"""Losses of the Chunk-Head: boundaries against pseudo-labels, summaries against deep states (SPEC 3.4-3.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.chunk_head import Segmentation, chunk_means
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import BIOS, IGNORED_LABEL, ChunkLabels, ChunkTap, PassTaps

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel

_BLANK = len(BIOS)
_INFONCE_TEMPERATURE = 0.07


def boundary_loss_rows(config: FBSConfig, tap: ChunkTap, labels: ChunkLabels | None) -> Tensor:
    """L_chunk of each sequence [B]: cross entropy, CTC or, without labels, the closing-rate prior."""
    member_BT = tap.chunk_id_BT >= 0
    size_B = member_BT.sum(1).clamp_min(1)
    rate_B = (tap.close_prob_BT * member_BT).sum(1) / size_B
    prior_B = (rate_B - config.chunk_close_rate) ** 2 * member_BT.any(1)
    if labels is None:
        return prior_B
    labelled_BT = member_BT & (labels.labels_BT != IGNORED_LABEL)
    has_B = labelled_BT.any(1)
    weights_C = labels.class_weights_C
    if weights_C is None:
        weights_C = class_weights(labels.labels_BT)
    exact_B = row_cross_entropy(
        tap.boundary_logits_BT4,
        labels.labels_BT.masked_fill(~labelled_BT, IGNORED_LABEL),
        weights_C,
    )
    trusted_B = torch.full_like(has_B, True)
    if not labels.force_cross_entropy:
        trusted_B = trusts_labels(
            config, tap.boundary_logits_BT4, labelled_BT, labels.coverage_B.to(prior_B)
        )
    loss_B = torch.where(has_B, torch.where(trusted_B, exact_B, 0.0), prior_B)
    if labels.force_cross_entropy:  # and the device need not be waited for
        return loss_B
    for row in (has_B & ~trusted_B).nonzero().flatten().tolist():
        where = labelled_BT[row]
        aligned = ctc_loss(
            tap.boundary_logits_BT4[row][where],
            tap.blank_logits_BT[row][where],
            labels.labels_BT[row][where],
        )
        loss_B = loss_B.index_add(0, torch.tensor([row], device=loss_B.device), aligned.view(1))
    return loss_B


def row_cross_entropy(logits_BT4: Tensor, labels_BT: Tensor, weights_C: Tensor) -> Tensor:
    """Class-weighted mean cross entropy in nats of each row [B]; 0 for a row without labels."""
    weights_C = weights_C.to(logits_BT4)
    ce_BT = F.cross_entropy(
        logits_BT4.transpose(1, 2),
        labels_BT,
        weights_C,
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    weight_BT = weights_C[labels_BT.clamp_min(0)] * (labels_BT != IGNORED_LABEL)
    return ce_BT.sum(1) / weight_BT.sum(1).clamp_min(1e-6)


def trusts_labels(
    config: FBSConfig, logits_BT4: Tensor, labelled_BT: Tensor, coverage_B: Tensor
) -> Tensor:
    """[B] bool: trained token by token, since enough is covered and the head is confident (SPEC 3.5)."""
    sure_BT = logits_BT4.detach().softmax(-1).amax(-1)
    confidence_B = (sure_BT * labelled_BT).sum(1) / labelled_BT.sum(1).clamp_min(1)
    return (coverage_B >= config.loss_coverage_min) & (confidence_B >= config.loss_confidence_min)


def class_weights(labels_BT: Tensor) -> Tensor:
    """Inverse frequency of each class in the batch, scaled so that a balanced batch weighs 1; absent classes 0."""
    counts = torch.bincount(labels_BT[labels_BT != IGNORED_LABEL], minlength=len(BIOS)).float()
    return torch.where(counts > 0, counts.sum() / (len(BIOS) * counts.clamp_min(1)), 0.0)


def collapse(labels_T: Tensor) -> Tensor:
    """The label string with equal neighbours merged: what CTC can align with at most T frames."""
    keep = torch.ones_like(labels_T, dtype=torch.bool)
    keep[1:] = labels_T[1:] != labels_T[:-1]
    return labels_T[keep]


def ctc_loss(logits_T4: Tensor, blank_T: Tensor, labels_T: Tensor) -> Tensor:
    """CTC of one sequence against its collapsed labels, in nats per frame; always finite."""
    log_prob_T5 = torch.cat((logits_T4, blank_T.unsqueeze(-1)), dim=-1).float().log_softmax(-1)
    target = collapse(labels_T)
    frames, symbols = torch.tensor([len(log_prob_T5)]), torch.tensor([len(target)])
    summed = F.ctc_loss(
        log_prob_T5.unsqueeze(1),
        target.unsqueeze(0),
        frames,
        symbols,
        blank=_BLANK,
        reduction="sum",
    )
    return summed / len(log_prob_T5)


def consistency_loss_rows(model: FBSModel, taps: PassTaps) -> Tensor:
    """L_cons of each sequence [B]: mean over chunk layers and chunks of 1 − cos(W_s u_j, sg(mean h^L)), or InfoNCE."""
    chunks, final = taps.chunks, taps.final_state_BTd
    assert chunks is not None and final is not None
    losses = []
    count = next(iter(chunks.summaries.values())).shape[1]
    present_BN = torch.arange(count, device=final.device) <= chunks.chunk_id_BT.amax(
        1, keepdim=True
    )
    deep_BNd = chunk_means(final.detach(), _membership(chunks, count))
    for index, summary_BNW in chunks.summaries.items():
        reader = model.get_submodule(f"layers.{index}.chunk_reader")
        guess_BNd = reader.consistency(summary_BNW)  # pyright: ignore[reportCallIssue]
        losses.append(_agreement(model.config.chunk_consistency, guess_BNd, deep_BNd, present_BN))
    return torch.stack(losses).mean(0)


def _membership(tap: ChunkTap, count: int) -> Segmentation:
    nothing = torch.zeros_like(tap.chunk_id_BT)
    return Segmentation(tap.opens_BT, tap.chunk_id_BT, nothing, nothing, nothing, count)


def _agreement(kind: str, guess_BNd: Tensor, deep_BNd: Tensor, present_BN: Tensor) -> Tensor:
    guess, deep = F.normalize(guess_BNd.float(), dim=-1), F.normalize(deep_BNd.float(), dim=-1)
    if kind == "cosine":
        loss_BN = 1 - (guess * deep).sum(-1)
    else:  # InfoNCE: the other chunks of the sequence are the negatives
        scores_BNN = (guess @ deep.transpose(1, 2) / _INFONCE_TEMPERATURE).masked_fill(
            ~present_BN.unsqueeze(1), float("-inf")
        )
        own = torch.arange(scores_BNN.shape[1], device=scores_BNN.device).expand(
            len(scores_BNN), -1
        )
        scores_BNN = torch.where(present_BN.unsqueeze(-1), scores_BNN, 0.0)
        loss_BN = F.cross_entropy(scores_BNN.transpose(1, 2), own, reduction="none")
    return (loss_BN * present_BN).sum(1) / present_BN.sum(1).clamp_min(1)
