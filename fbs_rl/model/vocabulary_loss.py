"""Losses over the whole vocabulary from final states, without ever holding [B, T, V] logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fbs_rl.model.compiled import compilable
from fbs_rl.types import IGNORED_LABEL, DenseReference

_LOGIT_BYTES = 2**29
"""Logits exist this many bytes (of float32) at a time, and again in the backward pass."""


def next_token_labels(labels_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
    """[B, T]: at each token the label of the one after it; IGNORED_LABEL at the end of a document or row."""
    target_BT = torch.full_like(labels_BT, IGNORED_LABEL)
    target_BT[:, :-1] = labels_BT[:, 1:]
    if document_BT is not None:
        crosses = document_BT[:, 1:] != document_BT[:, :-1]
        target_BT[:, :-1] = target_BT[:, :-1].masked_fill(crosses, IGNORED_LABEL)
    return target_BT


def cross_entropy_sum(state_BTd: Tensor, head_Vd: Tensor, target_BT: Tensor) -> Tensor:
    """Σ of −log softmax(head·state)[target] in nats, over targets that are not IGNORED_LABEL."""
    if state_BTd.is_cuda and torch.is_grad_enabled():
        return _FusedCrossEntropy.apply(state_BTd.flatten(0, 1), head_Vd, target_BT.flatten())  # pyright: ignore[reportReturnType]
    rows = _rows(head_Vd)
    pieces = zip(state_BTd.flatten(0, 1).split(rows), target_BT.flatten().split(rows), strict=True)
    return torch.stack([_saving(_cross_entropy, s, head_Vd, target) for s, target in pieces]).sum()


def divergence_sum(
    state_BTd: Tensor, head_Vd: Tensor, dense: DenseReference, where_BT: Tensor
) -> Tensor:
    """Σ of KL(p_dense || p) in nats over the tokens `where`; no gradient reaches the dense side."""
    rows = _rows(head_Vd)
    pieces = zip(
        state_BTd.flatten(0, 1).split(rows),
        dense.state_BTd.detach().flatten(0, 1).split(rows),
        where_BT.flatten().split(rows),
        strict=True,
    )
    other_Vd = dense.head_Vd.detach()
    sums = [_saving(_divergence, s, head_Vd, d, other_Vd, where) for s, d, where in pieces]
    return torch.stack(sums).sum()


def weighted_losses(
    state_BTd: Tensor,
    head_Vd: Tensor,
    target_BT: Tensor,
    dense: DenseReference,
    where_BT: Tensor,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(their sum with `weights`, cross_entropy_sum, divergence_sum) from one set of logits, with one gradient.

    Only the weighted sum carries a gradient.
    """
    total, cross_entropy, divergence = _FusedLosses.apply(  # pyright: ignore[reportGeneralTypeIssues]
        state_BTd.flatten(0, 1),
        head_Vd,
        target_BT.flatten(),
        dense.state_BTd.detach().flatten(0, 1),
        dense.head_Vd.detach(),
        where_BT.flatten(),
        *weights,
    )
    return total, cross_entropy, divergence


class _FusedLosses(torch.autograd.Function):
    """weighted_losses in the way of _FusedCrossEntropy."""

    @staticmethod
    def forward(
        ctx: Any, state_Xd: Tensor, head_Vd: Tensor, target_X: Tensor, dense_Xd: Tensor, dense_Vd: Tensor,
        where_X: Tensor, weight_ce: float, weight_kl: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows = max(1, 2 * _LOGIT_BYTES // (2 * head_Vd.shape[0]))
        sums_2 = state_Xd.new_zeros(2, dtype=torch.float32)
        state_grad = torch.empty_like(state_Xd)
        head_grad = torch.zeros_like(head_Vd, dtype=torch.float32)
        # As a tensor: numbers would be compiled in, and counts change from step to step.
        weights_2 = torch.stack([sums_2.new_full((), weight_ce), sums_2.new_full((), weight_kl)])
        parts = (state_Xd, target_X, dense_Xd, where_X, state_grad)
        for state, target, other, where, gradient in zip(
            *(part.split(rows) for part in parts), strict=True
        ):
            sums, logit_grad = _losses_and_gradient(
                F.linear(state, head_Vd), target, F.linear(other, dense_Vd), where, weights_2
            )
            sums_2 += sums
            torch.mm(logit_grad, head_Vd, out=gradient)
            head_grad += logit_grad.t() @ state
        ctx.save_for_backward(state_grad, head_grad.to(head_Vd.dtype))
        cross_entropy, divergence = sums_2.clone().unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return (weights_2 * sums_2).sum(), cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        state_grad, head_grad = ctx.saved_tensors
        scale = gradients[0]
        return (
            (state_grad * scale).to(state_grad.dtype),
            (head_grad * scale).to(head_grad.dtype),
            *[None] * 6,
        )


@compilable
def _losses_and_gradient(
    logits_XV: Tensor, target_X: Tensor, dense_XV: Tensor, where_X: Tensor, weights_2: Tensor
) -> tuple[Tensor, Tensor]:
    """((Σ cross entropy, Σ KL(dense || logits)) in nats, the gradient of their weighted sum to the logits)."""
    wide_XV, other_XV = logits_XV.float(), dense_XV.float()
    lse_X1 = wide_XV.logsumexp(-1, keepdim=True)
    dense_lse_X1 = other_XV.logsumexp(-1, keepdim=True)
    counted_X1 = (target_X != IGNORED_LABEL).unsqueeze(-1)
    where_X1 = where_X.unsqueeze(-1)
    column_X1 = target_X.clamp_min(0).unsqueeze(-1)
    own_X1 = logits_XV.gather(-1, column_X1).float()
    dense_prob_XV = (other_XV - dense_lse_X1).exp()
    kl_X = (dense_prob_XV * ((other_XV - dense_lse_X1) - (wide_XV - lse_X1))).sum(-1)
    prob_XV = (wide_XV - lse_X1).exp()
    every_V = torch.arange(logits_XV.shape[1], device=logits_XV.device)
    of_ce = (prob_XV - (every_V == column_X1).float()) * (counted_X1 * weights_2[0])
    of_kl = (prob_XV - dense_prob_XV) * (where_X1 * weights_2[1])
    sums_2 = torch.stack([((lse_X1 - own_X1) * counted_X1).sum(), (kl_X * where_X).sum()])
    return sums_2, (of_ce + of_kl).to(logits_XV.dtype)


class _FusedCrossEntropy(torch.autograd.Function):
    """cross_entropy_sum with its gradients made in the forward pass, a few thousand tokens at a time.

    Nothing is computed twice and no logits are kept: the way of Liger's fused linear cross entropy (Hsu et al.
    2024). Its own kernel cuts 16 k tokens of a 150 k vocabulary into 128 pieces and adds to the output
    embedding's gradient after each, which took a fifth of the whole step of a 0.6B model on an H100.
    """

    @staticmethod
    def forward(ctx: Any, state_Xd: Tensor, head_Vd: Tensor, target_X: Tensor) -> Tensor:
        rows = max(1, 4 * _LOGIT_BYTES // (2 * head_Vd.shape[0]))
        total = state_Xd.new_zeros((), dtype=torch.float32)
        state_grad = torch.empty_like(state_Xd)
        head_grad = torch.zeros_like(head_Vd, dtype=torch.float32)
        pieces = zip(
            state_Xd.split(rows), target_X.split(rows), state_grad.split(rows), strict=True
        )
        for state, target, gradient in pieces:
            loss, logit_grad = _loss_and_gradient(F.linear(state, head_Vd), target)
            total += loss
            torch.mm(logit_grad, head_Vd, out=gradient)
            head_grad += logit_grad.t() @ state
        ctx.save_for_backward(state_grad, head_grad.to(head_Vd.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        state_grad, head_grad = ctx.saved_tensors
        scale = gradients[0]
        return (
            (state_grad * scale).to(state_grad.dtype),
            (head_grad * scale).to(head_grad.dtype),
            None,
        )


@compilable
def _loss_and_gradient(logits_XV: Tensor, target_X: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ cross entropy in nats, its gradient to the logits in their type)."""
    wide_XV = logits_XV.float()
    lse_X1 = wide_XV.logsumexp(-1, keepdim=True)
    counted_X1 = (target_X != IGNORED_LABEL).unsqueeze(-1)
    column_X1 = target_X.clamp_min(0).unsqueeze(-1)
    own_X1 = wide_XV.gather(-1, column_X1)
    every_V = torch.arange(logits_XV.shape[1], device=logits_XV.device)
    gradient = ((wide_XV - lse_X1).exp() - (every_V == column_X1).float()) * counted_X1
    return ((lse_X1 - own_X1) * counted_X1).sum(), gradient.to(logits_XV.dtype)


def _rows(head_Vd: Tensor) -> int:
    return max(1, _LOGIT_BYTES // (4 * head_Vd.shape[0]))


def _saving(function: object, *arguments: Tensor) -> Tensor:
    return checkpoint(function, *arguments, use_reentrant=False)  # pyright: ignore[reportArgumentType, reportReturnType]


@compilable
def _cross_entropy(state_Xd: Tensor, head_Vd: Tensor, target_X: Tensor) -> Tensor:
    logits = F.linear(state_Xd, head_Vd).float()
    return F.cross_entropy(logits, target_X, ignore_index=IGNORED_LABEL, reduction="sum")


@compilable
def _divergence(
    state_Xd: Tensor, head_Vd: Tensor, dense_Xd: Tensor, dense_Vd: Tensor, where_X: Tensor
) -> Tensor:
    log_p = F.linear(state_Xd, head_Vd).float().log_softmax(-1)
    log_dense = F.linear(dense_Xd, dense_Vd).float().log_softmax(-1)
    kl_X = F.kl_div(log_p, log_dense, log_target=True, reduction="none").sum(-1)
    return (kl_X * where_X).sum()
