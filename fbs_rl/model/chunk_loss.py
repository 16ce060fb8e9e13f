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


def boundary_loss(config: FBSConfig, tap: ChunkTap, labels: ChunkLabels | None) -> Tensor:
    """L_chunk, mean over sequences: cross entropy, CTC or the closing-rate prior, chosen per sequence."""
    rows = []
    for row in range(tap.close_prob_BT.shape[0]):
        member_T = tap.chunk_id_BT[row] >= 0
        labelled_T = (
            member_T & (labels.labels_BT[row] != IGNORED_LABEL)
            if labels is not None
            else member_T & False
        )
        if labels is None or not bool(labelled_T.any()):
            rate = (
                tap.close_prob_BT[row][member_T].mean()
                if bool(member_T.any())
                else tap.close_prob_BT.sum() * 0
            )
            rows.append((rate - config.chunk_close_rate) ** 2)
            continue
        logits, wanted = tap.boundary_logits_BT4[row][labelled_T], labels.labels_BT[row][labelled_T]
        if labels.force_cross_entropy or trusts_labels(
            config, logits, float(labels.coverage_B[row])
        ):
            rows.append(F.cross_entropy(logits, wanted, weight=class_weights(labels.labels_BT)))
        else:
            rows.append(ctc_loss(logits, tap.blank_logits_BT[row][labelled_T], wanted))
    return torch.stack(rows).mean()


def trusts_labels(config: FBSConfig, logits_T4: Tensor, coverage: float) -> bool:
    """Whether a sequence is trained token by token: enough of it is covered and the head is confident (SPEC 3.5)."""
    confidence = float(logits_T4.detach().softmax(-1).amax(-1).mean())
    return coverage >= config.loss_coverage_min and confidence >= config.loss_confidence_min


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


def consistency_loss(model: FBSModel, taps: PassTaps) -> Tensor:
    """L_cons: mean over chunk layers and chunks of 1 − cos(W_s u_j, sg(mean h^L over the chunk)), or InfoNCE."""
    chunks, final = taps.chunks, taps.final_state_BTd
    assert chunks is not None and final is not None
    losses = []
    for index, summary_BNW in chunks.summaries.items():
        count = summary_BNW.shape[1]
        present_BN = torch.arange(count, device=final.device) <= chunks.chunk_id_BT.amax(
            1, keepdim=True
        )
        deep_BNd = chunk_means(final.detach(), _membership(chunks, count))
        reader = model.get_submodule(f"layers.{index}.chunk_reader")
        guess_BNd = reader.consistency(summary_BNW)  # pyright: ignore[reportCallIssue]
        losses.append(_agreement(model.config.chunk_consistency, guess_BNd, deep_BNd, present_BN))
    return torch.stack(losses).mean()


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
    return (loss_BN * present_BN).sum() / present_BN.sum().clamp_min(1)
