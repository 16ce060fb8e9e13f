"""Losses over the whole vocabulary from final states, without ever holding [B, T, V] logits."""

from __future__ import annotations

import functools
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
    if state_BTd.is_cuda and _liger() is not None:
        return _liger()(head_Vd, state_BTd.flatten(0, 1), target_BT.flatten())
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


@functools.cache
def _liger() -> Any:
    """Liger's fused product and cross entropy, which needs no second product; None where it is not installed."""
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED_LABEL, reduction="sum", accum_dtype=torch.float32
    )


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
