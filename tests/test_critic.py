"""The value head and explained variance, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fbs_rl.rl.critic import ValueHead, explained_variance


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_value_head_starts_at_zero_and_does_not_move_what_it_reads() -> None:
    torch.manual_seed(0)
    head, state_BTd = ValueHead(16, width=8), draw(2, 3, 16).bfloat16().requires_grad_()
    value_BT = head(state_BTd)
    assert value_BT.shape == (2, 3) and value_BT.dtype == torch.float32 and not value_BT.any()
    (value_BT - 1).square().sum().backward()
    assert state_BTd.grad is None and head.out.weight.grad is not None
    assert head.out.weight.grad.abs().max() > 0


def test_value_head_by_hand() -> None:
    torch.manual_seed(0)
    head, state_BTd = ValueHead(4, width=3, eps=0.0), draw(1, 1, 4)
    torch.nn.init.normal_(head.out.weight)
    h = state_BTd[0, 0] / state_BTd.pow(2).mean().sqrt()
    inner = head.hidden.weight @ h + head.hidden.bias
    wanted = head.out.weight[0] @ (inner * inner.sigmoid()) + head.out.bias[0]
    assert head(state_BTd).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_explained_variance_by_hand() -> None:
    target = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert explained_variance(target, target) == 1.0
    assert explained_variance(target + 5, target) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), target) == 0.0
    assert explained_variance(torch.tensor([0.0, 0.0, 0.0, 4.0]), target) == pytest.approx(
        1 - 0.5 / 3.5
    )
    assert math.isnan(explained_variance(target, torch.ones(4)))
