"""Forms that training on a GPU takes for speed, against the plain ones of the same quantity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbs_rl.model.chunk_head import _means_by_product, chunk_means, segment
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.preview import Paw, _group_maxima
from fbs_rl.model.preview_loss import _class_cross_entropy, _RecomputedCrossEntropy
from fbs_rl.model.vocabulary_loss import cross_entropy_sum, divergence_sum, weighted_losses
from fbs_rl.types import IGNORED_LABEL, DenseReference
from tests.tiny import fresh, lively


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [7, 1000])
def test_weighted_losses_equal_the_two_losses_apart(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbs_rl.model.vocabulary_loss._LOGIT_BYTES", rows * 2 * 50 // 2)
    state, head = draw(2, 20, 16).requires_grad_(), draw(50, 16, seed=1).requires_grad_()
    target = torch.arange(40).view(2, 20) % 50
    target[0, :5] = IGNORED_LABEL
    dense = DenseReference(draw(2, 20, 16, seed=2), draw(50, 16, seed=3))
    where = draw(2, 20, seed=4) > 0
    apart = cross_entropy_sum(state, head, target), divergence_sum(state, head, dense, where)
    total, *parts = weighted_losses(state, head, target, dense, where, (0.3, 0.7))
    torch.testing.assert_close(torch.stack(parts), torch.stack(apart))
    assert not any(part.requires_grad for part in parts)
    wanted = torch.autograd.grad(2 * (0.3 * apart[0] + 0.7 * apart[1]), [state, head])
    for found, one in zip(torch.autograd.grad(2 * total, [state, head]), wanted, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [7, 1000])
def test_recomputed_preview_losses_equal_the_plain_ones(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbs_rl.model.preview_loss._LOGIT_BYTES", rows * 2 * 48 // 4)
    leaves = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(30, 8), (48, 8), (8,)])]  # fmt: skip
    wanted_X = torch.arange(30) * 2 % 48
    wanted_X[:4], wanted_X[5:8] = IGNORED_LABEL, 48
    upstream = draw(30, seed=9)
    plain = _class_cross_entropy(leaves[0], leaves[1], leaves[2], wanted_X)
    found: Tensor = _RecomputedCrossEntropy.apply(*leaves, wanted_X)  # pyright: ignore[reportAssignmentType]
    torch.testing.assert_close(found, plain)
    grads = (torch.autograd.grad((ce * upstream).sum(), leaves) for ce in (found, plain))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_best_candidates_lie_in_the_groups_with_the_highest_maxima() -> None:
    score_XN, prior_N = draw(9, 8192), draw(8192, seed=1)
    best = (score_XN + prior_N).topk(64).indices
    groups = _group_maxima(score_XN, prior_N).topk(64).indices
    assert ((best // 32).unsqueeze(-1) == groups.unsqueeze(1)).any(-1).all()


def test_the_dense_convolution_equals_the_grouped_one() -> None:
    paw = Paw(FBSConfig(hidden_size=64, paw_rank=32))
    paw.reset_parameters()
    values = draw(2, 3, 15, 32).requires_grad_()
    leaves = [values, paw.mix.weight, paw.mix.bias]
    made = paw._convolve(values, None), paw._convolve_densely(values)
    torch.testing.assert_close(made[1], made[0])
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in made)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_chunk_means_by_product_equal_differences_of_sums() -> None:
    valid_BT = torch.ones(3, 20, dtype=torch.bool)
    valid_BT[2, 13:] = False
    made = segment(draw(3, 20, 4), valid_BT)
    values = draw(3, 20, 8, seed=1)
    torch.testing.assert_close(_means_by_product(values, made), chunk_means(values, made))


# --- what training may add ----------------------------------------------------------------------------


def test_imitation_is_the_error_of_the_adapters_and_trains_them_alone() -> None:
    """Mean over adapters and gated tokens of ‖skip(h) − F(h)‖² / ‖F(h) − h‖²; 1 while they are the identity."""
    ids = torch.arange(12).view(1, 12) % 60
    model = fresh(loss_imitation=0.5)
    made = model(ids, labels=ids, gates="dense", decode_start=4)
    assert made.loss_parts is not None
    assert float(made.loss_parts["imitation"]) == pytest.approx(1.0, abs=1e-4)
    model = lively(loss_imitation=0.5)
    part = model(ids, labels=ids, gates="dense", decode_start=4).loss_parts["imitation"]
    part.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved and all(".skip_path." in name for name in moved)
    states = model(ids, gates="dense", output_hidden_states=True).taps
    ends = [*states.states[1:], states.final_state_BTd]
    errors = []
    for layer in model.model.fbs_layers():
        if layer.index not in model.config.protected_layers:
            before, after = states.states[layer.index][:, 4:], ends[layer.index][:, 4:]
            norm = before * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)  # fmt: skip
            missed = layer.skip_path(before, norm) - after
            errors.append(missed.square().sum(-1) / (after - before).square().sum(-1))
    assert float(part) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_nobody_who_does_not_ask_pays_for_imitation() -> None:
    ids = torch.arange(12).view(1, 12)
    made = fresh()(ids, labels=ids, gates="dense")
    assert "imitation" not in made.loss_parts and made.taps.miss_ABT is None
