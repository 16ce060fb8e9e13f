"""Each loss of the objective against loops, formulas by hand and enumeration (SPEC 2.7, 3.5, 5)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.model.chunk_loss import boundary_loss, class_weights, collapse, ctc_loss, trusts_labels
from fbs_rl.model.objective import (
    distillation_loss,
    gate_loss,
    horizon_targets,
    language_model_loss,
    preview_cross_entropy,
    preview_loss,
    window_loss,
    window_target,
)
from fbs_rl.types import ChunkLabels, ChunkTap, PreviewTap
from tests.tiny import enliven, fresh, left_padded, lively

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- language model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_language_model_loss_equals_a_loop(packed: bool) -> None:
    logits, labels = draw(2, 7, 5), torch.tensor([[1, 2, -100, 4, 0, 3, 3], [-100] * 5 + [2, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [5] * 7]) if packed else None
    terms = []
    for row, t in itertools.product(range(2), range(6)):
        target = int(labels[row, t + 1])
        apart = documents is not None and documents[row, t] != documents[row, t + 1]
        if target >= 0 and not apart:
            prob = logits[row, t].double().exp() / logits[row, t].double().exp().sum()
            terms.append(-math.log(prob[target]))
    assert len(terms) == (5 if packed else 7)
    found = language_model_loss(logits, labels, documents).item()
    assert found == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_language_model_loss_without_labels_is_zero() -> None:
    assert language_model_loss(draw(1, 4, 5), torch.full((1, 4), -100)) == 0


def test_distillation_equals_the_divergence() -> None:
    gated, dense = draw(2, 3, 6, seed=1), draw(2, 3, 6, seed=2)
    acts = torch.tensor([[True, False, True], [False, False, True]])
    p, q = dense.double().softmax(-1), gated.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    wanted = (kl[0, 0] + kl[0, 2] + kl[1, 2]) / 3
    assert distillation_loss(gated, dense, acts).item() == pytest.approx(wanted.item(), abs=1e-6)
    assert distillation_loss(gated, dense, None).item() == pytest.approx(kl.mean().item(), abs=1e-6)
    assert distillation_loss(gated, gated, acts) == 0


def test_distillation_leaves_the_dense_side_alone() -> None:
    gated, dense = draw(1, 3, 6, seed=1).requires_grad_(), draw(1, 3, 6, seed=2).requires_grad_()
    distillation_loss(gated, dense, None).backward()
    assert gated.grad is not None and gated.grad.abs().max() > 0 and dense.grad is None


# --- preview ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_horizon_targets_equal_a_loop(packed: bool) -> None:
    ids, mask = left_padded(1, [9, 6, 1])
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [3] * 2, [0] * 9]) if packed else None
    found, known = horizon_targets(ids, 4, mask.bool(), documents)
    for row, t, h in itertools.product(range(3), range(9), range(1, 5)):
        exists = t + h < 9 and bool(mask[row, t]) and bool(mask[row, t + h])
        if documents is not None:
            exists = exists and bool(documents[row, t] == documents[row, min(t + h, 8)])
        assert bool(known[row, t, h - 1]) == exists
        if exists:
            assert found[row, t, h - 1] == ids[row, t + h]


def test_preview_cross_entropy_equals_a_loop() -> None:
    """Over the preview vocabulary and one class for all tokens outside it."""
    model = lively()
    head, embedding = model.model.preview, model.model.embed_tokens.weight
    ids, mask = left_padded(2, [12, 7])
    targets, known = horizon_targets(ids, 5, mask.bool())
    tap = PreviewTap(0, draw(2, 12, 32), torch.ones(2, 12), torch.ones(2, 12, 5))
    with torch.no_grad():
        reduced = head.reduced_embedding(embedding)
        found = preview_cross_entropy(head, tap, reduced, targets, known)
    kept = head.token_ids_N.tolist()
    classes = torch.cat((embedding[kept] @ head.embed_proj.weight.T, head.unk_R[None])).double()
    outside = 0
    for row, t, h in itertools.product(range(2), range(12), range(5)):
        if not (t + h + 1 < 12 and mask[row, t]):
            assert found[row, t, h] == 0
            continue
        token = int(ids[row, t + h + 1])
        wanted = kept.index(token) if token in kept else len(kept)
        outside += wanted == len(kept)
        score = classes @ (head.horizon_maps[h].double() @ tap.query_BTR[row, t].double())
        ce = score.logsumexp(0) - score[wanted]
        assert found[row, t, h].item() == pytest.approx(ce.item(), abs=2e-5)
    assert 10 < outside < int(known.sum()) - 10


def test_preview_loss_equals_a_loop() -> None:
    ce, inclusion = (
        draw(2, 3, 4).abs(),
        torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3)),
    )
    known = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(4)) < 0.6
    known[0, 1] = False
    terms = []
    for row, t in itertools.product(range(2), range(3)):
        weights = [float(inclusion[row, t, h]) for h in range(4) if known[row, t, h]]
        values = [float(ce[row, t, h]) for h in range(4) if known[row, t, h]]
        if weights:
            terms.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    assert len(terms) == 5
    found = preview_loss(ce, inclusion, known).item()
    assert found == pytest.approx(sum(terms) / 5, abs=1e-6)


@pytest.mark.parametrize(
    ("ce", "known", "wanted"),
    [
        ([1.0, 2.0, 2.4, 3.0, 1.0], 5, 4),
        ([3.0, 0.1, 0.1, 0.1, 0.1], 5, 1),
        ([0.1, 0.1, 0.1, 0.1, 0.1], 5, 5),
        ([2.5, 2.5, 2.6, 0.0, 0.0], 5, 3),
        ([0.1, 0.1, 0.0, 0.0, 0.0], 2, 3),
    ],
)
def test_window_target_by_hand(ce: list[float], known: int, wanted: int) -> None:
    mask = torch.arange(5) < known
    assert window_target(torch.tensor([[ce]]), mask.view(1, 1, 5), 2.5).item() == wanted


def test_window_loss_by_hand() -> None:
    ce = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [3.0, 0.0]]])  # targets 2, 2 and, not counted, 1
    known = torch.tensor([[[True, True], [True, True], [True, False]]])
    window = torch.tensor([[0.5, 1.75, 1.0]], requires_grad=True)
    tap = PreviewTap(0, draw(1, 3, 4), window, torch.ones(1, 3, 2))
    huber = ((1.5 - 0.5) + 0.5 * 0.25**2) / 2
    prior = ((0.5 + 1.75) / 2 / 2 - 0.54) ** 2
    found = window_loss(ce, tap, known, 2.5, 0.54)
    assert found.item() == pytest.approx(huber + prior, abs=1e-6)
    found.backward()
    assert window.grad is not None and window.grad[0, 2] == 0 and window.grad[0, 0] != 0
    assert window_loss(ce, tap, known & False, 2.5, 0.54) == 0


def test_preview_loss_does_not_train_the_window() -> None:
    """Nor the backbone's embedding; L_win trains the window and not the preview (SPEC 2.7, 2.8).

    With one PAW layer: a second one would read a state that the first one's window had a part in.
    """
    model = enliven(fresh(paw_layers=(0,)))
    ids = left_padded(3, [14, 14])[0]
    found = model(ids, labels=ids)
    paw, head = model.model.layers[0].paw, model.model.preview
    window = [paw.window_in.weight, paw.window_out.weight, paw.window_out.bias]
    preview = [head.state_proj.weight, head.embed_proj.weight, head.horizon_maps, head.unk_R]

    def gradients(part: str, parameters: list[Tensor]) -> list[Tensor | None]:
        loss = found.loss_parts[part]
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))

    assert gradients("preview", window) == [None] * 3
    assert gradients("window", preview) == [None] * 4
    trained = [*gradients("preview", preview), *gradients("window", window)]
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained)


def test_preview_losses_leave_the_output_embedding_alone() -> None:
    """E_r is made from a detached E; the input embedding is trained through the state alone."""
    model = enliven(fresh(tied=True))
    ids = torch.zeros(1, 14, dtype=torch.long)
    found = model(ids, labels=ids)
    (grad,) = torch.autograd.grad(found.loss_parts["preview"], model.lm_head.weight)
    assert grad[0].any() and not grad[1:].any()


# --- gate -----------------------------------------------------------------------------------------------------


def test_gate_loss_by_hand() -> None:
    prob = torch.tensor([[[0.95, 0.97, 0.2]], [[0.5, 0.3, 0.9]]])
    acts = torch.tensor([[True, True, False]])
    rates = [(0.95 + 0.97) / 2, (0.5 + 0.3) / 2]
    entropies = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.95, 0.97, 0.5, 0.3)]
    wanted = (sum(rates) / 2 - 0.36) ** 2 + 0.1 * (rates[0] - 0.9) ** 2 - 0.01 * sum(entropies) / 4
    assert gate_loss(prob, acts, 0.36).item() == pytest.approx(wanted, abs=1e-6)
    assert gate_loss(prob, acts & False, 0.36) == 0


def test_gate_loss_survives_certain_gates() -> None:
    prob = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    loss = gate_loss(prob, torch.ones(1, 2, dtype=torch.bool), 0.5)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(prob.grad).all()


# --- chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[0, 1, 1], [3], [2, 2, 2, 2], [0, 1, 0, 1], [0, 3, 0, 0]])
def test_ctc_equals_the_sum_over_alignments(labels: list[int]) -> None:
    """A frame string aligns if merging neighbours and dropping blanks gives the collapsed labels."""
    frames = len(labels)
    logits, blank = draw(frames, 4, seed=5), draw(frames, seed=6)
    log_prob = torch.cat((logits, blank.unsqueeze(-1)), 1).double().log_softmax(-1)
    merged = [label for label, _ in itertools.groupby(labels)]
    total = 0.0
    for path in itertools.product(range(5), repeat=frames):
        if [s for s, _ in itertools.groupby(path) if s != 4] == merged:
            total += math.exp(sum(log_prob[t, s].item() for t, s in enumerate(path)))
    found = ctc_loss(logits, blank, torch.tensor(labels)).item()
    assert found == pytest.approx(-math.log(total) / frames, abs=1e-5)


@PROPERTY
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.floats(0, 60))
def test_ctc_is_finite_on_collapsed_labels(labels: list[int], scale: float) -> None:
    target = torch.tensor(labels)
    assert collapse(target).tolist() == [label for label, _ in itertools.groupby(labels)]
    logits = (scale * draw(len(labels), 4, seed=7)).requires_grad_()
    loss = ctc_loss(logits, scale * draw(len(labels), seed=8), target)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_class_weights_are_inverse_frequencies() -> None:
    labels = torch.tensor([[0, 1, 1, 1, -100], [2, 1, -100, 0, -100]])
    assert class_weights(labels).tolist() == pytest.approx([7 / 8, 7 / 16, 7 / 4, 0.0])


def chunk_tap(logits: Tensor, valid: Tensor) -> ChunkTap:
    return ChunkTap(
        logits,
        draw(*logits.shape[:2], seed=9),
        1 - logits.softmax(-1)[..., 1],
        valid,
        torch.where(valid, 0, -1),
    )


@pytest.mark.parametrize(
    ("coverage", "sharpness", "forced", "kind"),
    [
        (0.9, 5.0, False, "ce"),
        (0.8, 5.0, False, "ce"),
        (0.79, 5.0, False, "ctc"),
        (0.9, 0.1, False, "ctc"),
        (0.1, 0.1, True, "ce"),
    ],
)
def test_boundary_loss_chooses_by_coverage_and_confidence(
    coverage: float, sharpness: float, forced: bool, kind: str
) -> None:
    config = lively().config
    logits = sharpness * draw(1, 6, 4, seed=10)
    labels = ChunkLabels(torch.tensor([[-100, 0, 1, 3, 0, -100]]), torch.tensor([coverage]), forced)
    tap = chunk_tap(logits, torch.ones(1, 6, dtype=torch.bool))
    part, wanted = logits[0, 1:5], labels.labels_BT[0, 1:5]
    confidence = part.softmax(-1).amax(-1).mean().item()
    assert (confidence > 0.6) == (sharpness == 5.0)
    if kind == "ce":
        frequency = torch.tensor([2.0, 1.0, 0.0, 1.0])[wanted]  # weights are 1/2, 1, 0, 1
        weight = 1 / frequency
        nll = -part.log_softmax(-1)[torch.arange(4), wanted]
        expected = (nll * weight).sum() / weight.sum()
    else:
        expected = ctc_loss(part, tap.blank_logits_BT[0, 1:5], wanted)
    found = boundary_loss(config, tap, labels)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert trusts_labels(config, part, coverage) == (kind == "ce" and not forced)


def test_boundary_loss_without_labels_is_the_rate_prior() -> None:
    """Mean over sequences: a labelled one and one that has none, whose padding does not count."""
    config, logits = lively().config, draw(2, 5, 4, seed=11)
    valid = torch.tensor([[True] * 5, [False, False, True, True, True]])
    labels = ChunkLabels(
        torch.tensor([[0, 1, 1, 3, 2], [-100] * 5]), torch.tensor([0.0, math.nan]), False
    )
    tap = chunk_tap(logits, valid)
    prior = (tap.close_prob_BT[1, 2:].mean() - 0.35) ** 2
    ctc = ctc_loss(logits[0], tap.blank_logits_BT[0], labels.labels_BT[0])
    found = boundary_loss(config, tap, labels)
    assert found.item() == pytest.approx(((prior + ctc) / 2).item(), abs=1e-6)
    both = [(tap.close_prob_BT[0].mean() - 0.35) ** 2, prior]
    assert boundary_loss(config, tap, None).item() == pytest.approx(sum(both).item() / 2, abs=1e-6)
