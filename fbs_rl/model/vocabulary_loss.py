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
