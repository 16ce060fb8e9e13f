"""Losses of the Preview-Attention Window: what it predicts, and how far it looks (SPEC 2.7, 2.8)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fbs_rl.model.compiled import compilable
from fbs_rl.model.preview import PreviewHead
from fbs_rl.types import IGNORED_LABEL, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.configuration import FBSConfig

_LOGIT_BYTES = 2**28
"""Scores over the preview vocabulary exist this many bytes at a time (and again in the backward pass)."""


@dataclass(slots=True, frozen=True)
class PreviewDraw:
    """Which predictions of a step are scored: `taps` of the PAW layers, and every `every`-th column from `first`."""

    taps: tuple[int, ...]
    first: int
    every: int

    @classmethod
    def of(cls, config: FBSConfig, draw: int) -> PreviewDraw:
        """A pure function of `draw`: all calls of one step must be given the same."""
        chosen = random.Random(draw)
        count = len(config.preview_layers)
        taps = chosen.sample(range(count), min(config.loss_preview_taps, count))
        return cls(
            tuple(taps), chosen.randrange(config.loss_preview_every), config.loss_preview_every
        )

    @property
    def columns(self) -> slice:
        return slice(self.first, None, self.every)


@dataclass(slots=True)
class HorizonTargets:
    """ids_BTK: x_{t+h} for h = 1..K. known_BTK: whether it exists in the same document."""

    ids_BTK: Tensor
    known_BTK: Tensor

    @property
    def scored_BT(self) -> Tensor:
        return self.known_BTK.any(-1)

    @property
    def full_BT(self) -> Tensor:
        return self.known_BTK.all(-1)


def horizon_targets(
    ids_BT: Tensor,
    horizons: int,
    valid_BT: Tensor | None = None,
    document_BT: Tensor | None = None,
    columns: slice = slice(None),
) -> HorizonTargets:
    """What the tokens at `columns` should predict."""
    length = ids_BT.shape[1]
    column_T = torch.arange(length, device=ids_BT.device)[columns]
    index_TK = column_T[:, None] + torch.arange(1, horizons + 1, device=ids_BT.device)
    inside_TK = index_TK < length
    index_TK = index_TK.clamp_max(length - 1)
    known_BTK = inside_TK.expand(len(ids_BT), -1, -1)
    if valid_BT is not None:
        known_BTK = known_BTK & valid_BT[:, index_TK] & valid_BT[:, column_T].unsqueeze(-1)
    if document_BT is not None:
        own_BT1 = document_BT[:, column_T].unsqueeze(-1)
        known_BTK = known_BTK & (document_BT[:, index_TK] == own_BT1)
    return HorizonTargets(ids_BT[:, index_TK], known_BTK)


def thin(tap: PreviewTap, columns: slice) -> PreviewTap:
    """The tap at some columns only."""
    return PreviewTap(
        tap.layer,
        tap.query_BTR[:, columns],
        tap.window_BT[:, columns],
        tap.inclusion_BTK[:, columns],
    )


def preview_cross_entropy(
    head: PreviewHead, tap: PreviewTap, reduced_NR: Tensor, targets: HorizonTargets
) -> Tensor:
    """CE_{t,h} [B, T, K] in nats over the preview vocabulary and UNK; 0 where there is no target."""
    wanted_BTK = _preview_classes(head, targets.ids_BTK)
    wanted_BTK = wanted_BTK.masked_fill(~targets.known_BTK, IGNORED_LABEL)
    queries_XR = torch.einsum("btr,ksr->btks", tap.query_BTR, head.horizon_maps).flatten(0, 2)
    if queries_XR.is_cuda:
        ce_X = _RecomputedCrossEntropy.apply(
            queries_XR, reduced_NR, head.unk_R, wanted_BTK.flatten()
        )
        return ce_X.view(wanted_BTK.shape)  # pyright: ignore[reportOptionalMemberAccess]
    rows = max(1, _LOGIT_BYTES // (4 * len(reduced_NR)))
    pieces = zip(queries_XR.split(rows), wanted_BTK.flatten().split(rows), strict=True)
    parts = [
        checkpoint(_class_cross_entropy, query, reduced_NR, head.unk_R, wanted, use_reentrant=False)
        for query, wanted in pieces
    ]
    return torch.cat(parts).view(wanted_BTK.shape)


class _RecomputedCrossEntropy(torch.autograd.Function):
    """_class_cross_entropy of all rows; scores are made again in the backward pass, not the sums over them."""

    @staticmethod
    def forward(
        ctx: Any, query_XR: Tensor, reduced_NR: Tensor, unk_R: Tensor, wanted_X: Tensor
    ) -> Tensor:
        ctx.rows = max(1, 4 * _LOGIT_BYTES // (2 * len(reduced_NR)))
        found = [
            _scores_cross_entropy(F.linear(query, reduced_NR), query @ unk_R, wanted)
            for query, wanted in zip(
                query_XR.split(ctx.rows), wanted_X.split(ctx.rows), strict=True
            )
        ]
        ce_X, lse_X = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(query_XR, reduced_NR, unk_R, wanted_X, lse_X)
        return ce_X

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_XR, reduced_NR, unk_R, wanted_X, lse_X = ctx.saved_tensors
        query_grad = torch.empty_like(query_XR)
        reduced_grad = torch.zeros_like(reduced_NR, dtype=torch.float32)
        unk_grad = torch.zeros_like(unk_R, dtype=torch.float32)
        parts = (query_XR, wanted_X, lse_X, gradients[0], query_grad)
        for query, wanted, lse, upstream, grad in zip(
            *(part.split(ctx.rows) for part in parts), strict=True
        ):
            score_grad, unk_score_grad = _scores_gradient(
                F.linear(query, reduced_NR), query @ unk_R, wanted, lse, upstream
            )
            torch.addmm(torch.outer(unk_score_grad, unk_R), score_grad, reduced_NR, out=grad)
            reduced_grad += score_grad.t() @ query
            unk_grad += unk_score_grad @ query
        return query_grad, reduced_grad.to(reduced_NR.dtype), unk_grad.to(unk_R.dtype), None


@compilable
def _scores_cross_entropy(
    scores_XN: Tensor, unk_X: Tensor, wanted_X: Tensor
) -> tuple[Tensor, Tensor]:
    """(CE [X], log of the sum over all classes [X]); UNK is the class after the last of scores_XN."""
    last = scores_XN.shape[1]
    own_X = scores_XN.gather(1, wanted_X.clamp(0, last - 1).unsqueeze(-1)).squeeze(-1)
    own_X = torch.where(wanted_X == last, unk_X, own_X).float()
    lse_X = torch.logaddexp(scores_XN.float().logsumexp(-1), unk_X.float())
    return (lse_X - own_X) * (wanted_X != IGNORED_LABEL), lse_X


@compilable
def _scores_gradient(
    scores_XN: Tensor, unk_X: Tensor, wanted_X: Tensor, lse_X: Tensor, upstream_X: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to the scores and to UNK's, in their types."""
    scale_X = upstream_X * (wanted_X != IGNORED_LABEL)
    every_N = torch.arange(scores_XN.shape[1], device=scores_XN.device)
    is_own_XN = (every_N == wanted_X.unsqueeze(-1)).float()
    prob_XN = (scores_XN.float() - lse_X.unsqueeze(-1)).exp()
    unk_grad_X = ((unk_X.float() - lse_X).exp() - (wanted_X == len(every_N)).float()) * scale_X
    score_grad_XN = (prob_XN - is_own_XN) * scale_X.unsqueeze(-1)
    return score_grad_XN.to(scores_XN.dtype), unk_grad_X.to(unk_X.dtype)


@compilable
def _class_cross_entropy(
    query_XR: Tensor, reduced_NR: Tensor, unk_R: Tensor, wanted_X: Tensor
) -> Tensor:
    """CE [X] over the N tokens and UNK, class N; 0 where `wanted` is IGNORED_LABEL.

    UNK is scored apart: a product of N + 1 columns is misaligned and takes twice as long on a GPU.
    """
    scores_XN = F.linear(query_XR, reduced_NR).float()
    unk_X = (query_XR @ unk_R).float()
    known_X = wanted_X.clamp(0, len(reduced_NR) - 1).unsqueeze(-1)
    own_X = torch.where(
        wanted_X == len(reduced_NR), unk_X, scores_XN.gather(1, known_X).squeeze(-1)
    )
    ce_X = torch.logaddexp(scores_XN.logsumexp(-1), unk_X) - own_X
    return ce_X * (wanted_X != IGNORED_LABEL)


def _preview_classes(head: PreviewHead, ids: Tensor) -> Tensor:
    """Index in the preview vocabulary, or its size (UNK) for tokens outside it."""
    position = torch.searchsorted(head.token_ids_N, ids).clamp_max(len(head.token_ids_N) - 1)
    return torch.where(head.token_ids_N[position] == ids, position, len(head.token_ids_N))


def preview_loss_sum(ce_BTK: Tensor, inclusion_BTK: Tensor, known_BTK: Tensor) -> Tensor:
    """Σ over tokens of Σ_h sg(α)·CE / Σ_h sg(α), over horizons with a target (SPEC 2.7).

    α is detached: with its gradient the window would shrink to where prediction is easy.
    """
    weight_BTK = inclusion_BTK.detach() * known_BTK
    weight_BT = weight_BTK.sum(-1)
    mean_BT = (weight_BTK * ce_BTK).sum(-1) / weight_BT.clamp_min(1e-6)
    return (mean_BT * known_BTK.any(-1)).sum()


def window_target(ce_BTK: Tensor, known_BTK: Tensor, nats: float) -> Tensor:
    """k* = clip(1 + max{h : CE_{t,h'} <= nats for all h' <= h}, 1, K): one past the readable run (SPEC 2.8)."""
    readable_BTK = (ce_BTK.detach() <= nats) & known_BTK
    run_BT = readable_BTK.long().cumprod(-1).sum(-1)
    return (1 + run_BT).clamp_max(ce_BTK.shape[-1])


def window_error_sum(ce_BTK: Tensor, window_BT: Tensor, known_BTK: Tensor, nats: float) -> Tensor:
    """Σ Huber(ŵ − k*) over tokens all of whose horizons are known."""
    target_BT = window_target(ce_BTK, known_BTK, nats).float()
    return (F.huber_loss(window_BT, target_BT, reduction="none") * known_BTK.all(-1)).sum()
