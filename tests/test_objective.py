"""Each loss of the objective against loops, formulas by hand and enumeration (SPEC 2.7, 3.5, 5)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.model.chunk_loss import (
    boundary_loss_rows,
    class_weights,
    collapse,
    ctc_loss,
    trusts_labels,
)
from fbs_rl.model.objective import binary_entropy, rate_penalty, window_drift
from fbs_rl.model.preview_loss import (
    PreviewDraw,
    horizon_targets,
    preview_cross_entropy,
    preview_loss_sum,
    window_error_sum,
    window_target,
)
from fbs_rl.model.vocabulary_loss import (
    _FusedCrossEntropy,
    cross_entropy_sum,
    divergence_sum,
    next_token_labels,
)
from fbs_rl.types import ChunkLabels, ChunkTap, DenseReference, PreviewTap
from tests.tiny import enliven, fresh, left_padded, lively

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- language model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [3, 1000])
def test_cross_entropy_equals_a_loop(
    packed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbs_rl.model.vocabulary_loss._LOGIT_BYTES", rows * 4 * 5)
    state, head = draw(2, 7, 3), draw(5, 3, seed=1)
    labels = torch.tensor([[1, 2, -100, 4, 0, 3, 3], [-100] * 5 + [2, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [5] * 7]) if packed else None
    terms = []
    for row, t in itertools.product(range(2), range(6)):
        target = int(labels[row, t + 1])
        apart = documents is not None and documents[row, t] != documents[row, t + 1]
        if target >= 0 and not apart:
            prob = (head.double() @ state[row, t].double()).softmax(0)
            terms.append(-math.log(prob[target]))
    assert len(terms) == (5 if packed else 7)
    wanted = next_token_labels(labels, documents)
    assert int((wanted >= 0).sum()) == len(terms)
    assert cross_entropy_sum(state, head, wanted).item() == pytest.approx(sum(terms), abs=1e-5)


def test_fused_cross_entropy_has_the_gradients_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU uses instead, in pieces of five tokens, under a factor."""
    monkeypatch.setattr("fbs_rl.model.vocabulary_loss._LOGIT_BYTES", 5 * 2 * 11 // 4)
    state, head = draw(23, 6).requires_grad_(), draw(11, 6, seed=1).requires_grad_()
    wanted = torch.randint(0, 11, (23,), generator=torch.Generator().manual_seed(2))
    wanted[::4] = -100
    found = _FusedCrossEntropy.apply(state, head, wanted)
    plain = torch.nn.functional.cross_entropy(state @ head.T, wanted, reduction="sum")
    torch.testing.assert_close(found, plain)
    for one, other in zip(
        torch.autograd.grad(0.3 * found, (state, head)),
        torch.autograd.grad(0.3 * plain, (state, head)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_cross_entropy_without_labels_is_zero() -> None:
    wanted = next_token_labels(torch.full((1, 4), -100))
    assert cross_entropy_sum(draw(1, 4, 3), draw(5, 3), wanted) == 0


@pytest.mark.parametrize("rows", [2, 1000])
def test_divergence_equals_the_definition(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbs_rl.model.vocabulary_loss._LOGIT_BYTES", rows * 4 * 6)
    state, head = draw(2, 3, 4, seed=1).requires_grad_(), draw(6, 4, seed=2).requires_grad_()
    other, other_head = draw(2, 3, 5, seed=3).requires_grad_(), draw(6, 5, seed=4)
    acts = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        p = (other @ other_head.T).double().softmax(-1)
        q = (state @ head.T).double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    found = divergence_sum(state, head, DenseReference(other, other_head), acts)
    assert found.item() == pytest.approx((kl[0, 0] + kl[0, 2] + kl[1, 2]).item(), abs=1e-5)
    found.backward()
    assert other.grad is None and state.grad is not None and head.grad is not None
    assert state.grad[acts].abs().max() > 0 and not state.grad[~acts].any()
    same = divergence_sum(state, head, DenseReference(state, head), acts)
    assert same.item() == pytest.approx(0.0, abs=1e-6)


# --- preview ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_horizon_targets_equal_a_loop(packed: bool) -> None:
    ids, mask = left_padded(1, [9, 6, 1])
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [3] * 2, [0] * 9]) if packed else None
    targets = horizon_targets(ids, 4, mask.bool(), documents)
    found, known = targets.ids_BTK, targets.known_BTK
    every_third = horizon_targets(ids, 4, mask.bool(), documents, slice(1, None, 3))
    assert torch.equal(every_third.known_BTK, known[:, 1::3])
    assert torch.equal(every_third.ids_BTK, found[:, 1::3])
    assert torch.equal(targets.full_BT, known.all(-1)) and bool(targets.scored_BT.any())
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
    targets = horizon_targets(ids, 5, mask.bool())
    known = targets.known_BTK
    tap = PreviewTap(0, draw(2, 12, 32), torch.ones(2, 12), torch.ones(2, 12, 5))
    with torch.no_grad():
        reduced = head.reduced_embedding(embedding)
        found = preview_cross_entropy(head, tap, reduced, targets)
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
    found = preview_loss_sum(ce, inclusion, known).item()
    assert found == pytest.approx(sum(terms), abs=1e-6)


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


def test_window_error_by_hand() -> None:
    ce = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [3.0, 0.0]]])  # targets 2, 2 and, not counted, 1
    known = torch.tensor([[[True, True], [True, True], [True, False]]])
    window = torch.tensor([[0.5, 1.75, 1.0]], requires_grad=True)
    found = window_error_sum(ce, window, known, 2.5)
    assert found.item() == pytest.approx((1.5 - 0.5) + 0.5 * 0.25**2, abs=1e-6)
    found.backward()
    assert window.grad is not None and window.grad[0, 2] == 0 and window.grad[0, 0] != 0
    assert window_error_sum(ce, window, known & False, 2.5) == 0


def test_penalties_of_a_part_have_the_gradient_of_the_whole() -> None:
    """Two halves of a step, linearised at the step's own means, together give the whole's gradient."""
    rates = torch.tensor([[0.95, 0.97, 0.2], [0.5, 0.3, 0.9]], requires_grad=True)
    mean = rates.mean(1)
    whole = rate_penalty(mean, None, True, 0.36) + window_drift(mean, None, True, 0.54).sum()
    (wanted,) = torch.autograd.grad(whole, rates)
    reference = rates.detach().mean(1)
    halves = [rates[:, :2].sum(1) / 3, rates[:, 2:].sum(1) / 3]
    parts = sum(
        rate_penalty(half, reference, False, 0.36)
        + window_drift(half, reference, False, 0.54).sum()
        for half in halves
    )
    (found,) = torch.autograd.grad(parts, rates)
    torch.testing.assert_close(found, wanted)
    nothing = rate_penalty(halves[0], None, False, 0.36) + window_drift(halves[0], None, False, 0.5)
    assert not nothing.any()


def test_draws_are_the_same_for_all_calls_of_a_step_and_cover_everything() -> None:
    config = fresh(paw_layers="all", loss_preview_taps=3, loss_preview_every=4).config
    draws = [PreviewDraw.of(config, step) for step in range(60)]
    assert draws == [PreviewDraw.of(config, step) for step in range(60)]
    assert {d.first for d in draws} == set(range(4))
    assert {tap for d in draws for tap in d.taps} == set(range(8))
    assert all(len(set(d.taps)) == 3 for d in draws)


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


def test_rate_penalty_and_entropy_by_hand() -> None:
    rates = torch.tensor([0.96, 0.4])
    wanted = (0.68 - 0.36) ** 2 + 0.1 * 0.06**2
    assert rate_penalty(rates, None, True, 0.36).item() == pytest.approx(wanted, abs=1e-6)
    for p in (0.2, 0.5, 0.97):
        wanted = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert binary_entropy(torch.tensor(p)).item() == pytest.approx(wanted, abs=1e-6)


def test_entropy_survives_certain_gates() -> None:
    prob = torch.tensor([0.0, 1.0], requires_grad=True)
    entropy = binary_entropy(prob).sum()
    entropy.backward()
    assert torch.isfinite(entropy) and prob.grad is not None and torch.isfinite(prob.grad).all()


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
    found = boundary_loss_rows(config, tap, labels)
    assert found.tolist() == [pytest.approx(expected.item(), abs=1e-6)]
    where = labels.labels_BT >= 0
    trusted = trusts_labels(config, logits, where, labels.coverage_B)
    assert trusted.tolist() == [kind == "ce" and not forced]


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
    found = boundary_loss_rows(config, tap, labels)
    assert found.tolist() == pytest.approx([ctc.item(), prior.item()], abs=1e-6)
    both = [((tap.close_prob_BT[0].mean() - 0.35) ** 2).item(), prior.item()]
    assert boundary_loss_rows(config, tap, None).tolist() == pytest.approx(both, abs=1e-6)
    assert boundary_loss_rows(config, chunk_tap(logits, valid & False), labels).tolist() == [0, 0]


def test_given_class_weights_replace_those_of_the_batch() -> None:
    config, logits = lively().config, draw(1, 4, 4, seed=12)
    labels, weight = torch.tensor([[0, 1, 1, 3]]), torch.tensor([0.5, 2.0, 1.0, 0.25])
    tap = chunk_tap(logits, torch.ones(1, 4, dtype=torch.bool))
    found = boundary_loss_rows(config, tap, ChunkLabels(labels, torch.tensor([1.0]), True, weight))
    nll = -logits[0].log_softmax(-1)[torch.arange(4), labels[0]]
    wanted = (nll * weight[labels[0]]).sum() / weight[labels[0]].sum()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_the_ceiling_may_be_lifted() -> None:
    """A rate of 1 in one of four layers, 0.24 on average too much: 0.24² and c·0.1² above it."""
    rate_L = torch.tensor([1.0, 0.2, 0.4, 0.8])
    assert float(rate_penalty(rate_L, None, True, 0.36, 0.0)) == pytest.approx(0.24**2)
    assert float(rate_penalty(rate_L, None, True, 0.36, 0.5)) == pytest.approx(0.24**2 + 0.005)
