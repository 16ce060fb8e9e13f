"""The objective as the model computes it: which parts there are, how they are weighed, what they train."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from fbs_rl.model.objective import binary_entropy, count_losses, rate_penalty
from fbs_rl.model.preview_loss import (
    PreviewDraw,
    horizon_targets,
    preview_cross_entropy,
    preview_loss_sum,
    thin,
    window_error_sum,
)
from fbs_rl.types import ChunkLabels, DenseReference, LossCounts, LossScope
from tests.tiny import LAYERS, enliven, fresh, left_padded, lively

PARTS = ("preview", "window", "chunk", "consistency", "gate", "distill")
IDS, MASK = left_padded(21, [16, 11, 13])
LABELS = IDS.masked_fill(MASK == 0, -100)


def run(model: Any, **call: Any) -> Any:
    return model(IDS, MASK, labels=LABELS, **{"gates": "sample", "gate_seed": 4, **call})


def weighted(**weights: float) -> Any:
    """The shared model under other loss weights."""
    model = copy.deepcopy(lively())
    for name, weight in weights.items():
        assert hasattr(model.config, f"loss_{name}")
        setattr(model.config, f"loss_{name}", weight)
    return model


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    model = lively()
    found = run(model)
    assert set(found.loss_parts) == {"lm", *PARTS}
    config = model.config
    wanted = found.loss_parts["lm"] + sum(
        getattr(config, f"loss_{name}") * found.loss_parts[name] for name in PARTS
    )
    torch.testing.assert_close(found.loss, wanted)
    assert [config.loss_preview, config.loss_window, config.loss_chunk] == [0.3, 0.01, 0.1]
    assert [config.loss_consistency, config.loss_gate] == [0.05, 0.01]


@pytest.mark.parametrize("name", PARTS)
def test_a_weight_scales_its_part_and_no_other(name: str) -> None:
    one, three = run(weighted(**{name: 1.0})), run(weighted(**{name: 3.0}))
    for part in one.loss_parts:
        assert torch.equal(one.loss_parts[part], three.loss_parts[part])
    assert one.loss_parts[name].abs() > 1e-6
    torch.testing.assert_close(three.loss - one.loss, 2 * one.loss_parts[name])


def test_language_part_is_the_loss_of_the_logits() -> None:
    found = run(lively())
    nll = -found.logits[:, :-1].double().log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    wanted = nll[LABELS[:, 1:] >= 0].mean().item()
    assert found.loss_parts["lm"].item() == pytest.approx(wanted, abs=1e-5)
    assert run(lively(), with_logits=False).logits is None
    assert torch.equal(run(lively(), with_logits=False).loss, found.loss)


@pytest.mark.parametrize("every", [1, 3])
def test_preview_part_scores_the_drawn_layers_and_columns(every: int) -> None:
    model = lively(paw_layers="all", loss_preview_taps=3, loss_preview_every=every)
    losses = set()
    for seed in range(4):
        with torch.no_grad():
            found = run(model, loss_seed=seed)
            chosen = PreviewDraw.of(model.config, seed)
            targets = horizon_targets(IDS, 5, MASK.bool(), columns=chosen.columns)
            known, full = targets.known_BTK, targets.full_BT
            reduced = model.model.preview.reduced_embedding(model.model.embed_tokens.weight)
            preview, window = 0.0, 0.0
            for index in chosen.taps:
                tap = thin(found.taps.previews[index], chosen.columns)
                ce = preview_cross_entropy(model.model.preview, tap, reduced, targets)
                scored = known.any(-1).sum()
                preview += (preview_loss_sum(ce, tap.inclusion_BTK, known) / scored).item() / 3
                drift = (tap.window_BT[full].mean() / 5 - 0.54) ** 2
                error = window_error_sum(ce, tap.window_BT, known, 2.5) / full.sum()
                window += (error + drift).item() / 3
        assert found.loss_parts["preview"].item() == pytest.approx(preview, abs=1e-6)
        assert found.loss_parts["window"].item() == pytest.approx(window, abs=1e-6)
        losses.add(found.loss_parts["preview"].item())
    assert len(losses) > 1


# --- a step made of several calls ------------------------------------------------------------------------------


def shares(model: Any, cuts: list[list[int]], scope: LossScope, **call: Any) -> dict[str, Any]:
    """Sums over calls of loss parts and of gradients, each call seeing some rows of the step."""
    model.zero_grad()
    parts: dict[str, Any] = {}
    labels = torch.randint(0, 4, IDS.shape, generator=torch.Generator().manual_seed(5))
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])
    for rows in cuts:
        chunk_labels = ChunkLabels(labels[rows], torch.ones(len(rows)), True, weights)
        found = model(
            IDS[rows], MASK[rows], labels=LABELS[rows], gates="sample", loss_scope=scope, loss_seed=3,
            gate_seed=torch.tensor([7, 8, 9])[rows], chunk_labels=chunk_labels, decode_start=2, **call,
        )  # fmt: skip
        found.loss.backward()
        for name, part in found.loss_parts.items():
            parts[name] = parts.get(name, 0.0) + part.item()
        for name in ("rate_sum_L", "window_sum_P", "entropy_sum"):
            parts[name] = parts.get(name, 0.0) + getattr(found.loss_report, name).double()
    return parts | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_parts_and_gradients_do_not_depend_on_how_a_step_is_cut() -> None:
    model = enliven(fresh(paw_layers="all", loss_preview_every=2))
    acts = (MASK.cumsum(1) - 1 >= 2) & MASK.bool()
    counts = count_losses(model.config, IDS, LABELS, acts, MASK.bool(), None, 3)
    halves = [
        count_losses(model.config, IDS[r], LABELS[r], acts[r], MASK[r].bool(), None, 3)
        for r in ([0], [1, 2])
    ]
    assert counts.lm == halves[0].lm + halves[1].lm == int((LABELS[:, 1:] >= 0).sum())
    assert counts.window == halves[0].window + halves[1].window < counts.preview
    scope = LossScope(counts, torch.linspace(0.2, 0.95, LAYERS), torch.linspace(1.0, 4.0, LAYERS))
    one = shares(model, [[0, 1, 2]], scope)
    assert "distill" in one and one["rate_sum_L"].shape == (LAYERS,)
    for cuts in ([[0], [1], [2]], [[2, 0], [1]], [[1], [0, 2]]):
        other = shares(model, cuts, scope)
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, atol=2e-6, rtol=1e-4, msg=name)


def test_a_whole_step_without_scope_is_the_same_but_for_the_squared_means() -> None:
    """And those agree in gradient when they are linearised at the means of the very step."""
    model = enliven(fresh())
    alone = model(IDS, MASK, labels=LABELS, gates="sample", gate_seed=4)
    report = alone.loss_report
    rate_L = report.rate_sum_L / report.counts.gated
    window_P = report.window_sum_P / report.counts.window
    scoped = model(
        IDS, MASK, labels=LABELS, gates="sample", gate_seed=4,
        loss_scope=LossScope(report.counts, rate_L, window_P),
    )  # fmt: skip
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    one = torch.autograd.grad(alone.loss, list(model.parameters()), allow_unused=True)
    other = torch.autograd.grad(scoped.loss, list(model.parameters()), allow_unused=True)
    for name, left, right in zip(names, one, other, strict=True):
        if left is not None:
            torch.testing.assert_close(right, left, atol=1e-6, rtol=1e-4, msg=name)
    for part in ("lm", "preview", "chunk", "consistency", "distill"):
        assert torch.equal(alone.loss_parts[part], scoped.loss_parts[part])


def test_counts_by_hand() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    labels = torch.tensor([[0, 0, -100, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    config = fresh(paw_horizon=2, paw_fixed_window=2).config
    gated = torch.tensor([[False] * 4 + [True] * 2, [False] * 5 + [True]])
    found = count_losses(config, ids, labels, gated, None, documents)
    # Row 0: targets at 0, 3, 4 (1 has no label after it, 2 ends a document); row 1: 0..4.
    assert found == LossCounts(lm=8, preview=4 + 5, window=2 + 4, gated=3, rows=2)


# --- consistency ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "infonce"])
def test_consistency_part_equals_a_loop(kind: str) -> None:
    model = lively(chunk_consistency=kind)
    with torch.no_grad():
        found = run(model)
    chunks, final = found.taps.chunks, found.taps.final_state_BTd.double()
    losses = []
    for layer in sorted(chunks.summaries):
        weight = model.model.layers[layer].chunk_reader.consistency.weight.double()
        terms = []
        for row in range(len(IDS)):
            owner = chunks.chunk_id_BT[row]
            count = int(owner.max()) + 1
            row_terms = []
            deep = torch.stack([final[row, owner == j].mean(0) for j in range(count)])
            guess = chunks.summaries[layer][row, :count].double() @ weight.T
            cosine = torch.cosine_similarity(guess[:, None], deep[None], dim=-1)
            for j in range(count):
                if kind == "cosine":
                    row_terms.append(1 - cosine[j, j].item())
                else:
                    row_terms.append(-(cosine[j] / 0.07).log_softmax(0)[j].item())
            terms.append(sum(row_terms) / len(row_terms))
        losses.append(sum(terms) / len(terms))
    assert len(losses) == 2
    assert found.loss_parts["consistency"].item() == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_consistency_pulls_summaries_not_deep_states() -> None:
    model = enliven(fresh())
    run(model, gates="dense").loss_parts["consistency"].backward()
    assert model.model.layers[4].chunk_reader.summarise.weight.grad.abs().max() > 0
    assert model.model.layers[LAYERS - 1].mlp.down_proj.weight.grad is None


# --- chunks ---------------------------------------------------------------------------------------------------


def test_chunk_labels_reach_the_boundary_loss() -> None:
    model = lively()
    labels = torch.randint(0, 4, IDS.shape, generator=torch.Generator().manual_seed(5))
    coverage = torch.tensor([1.0, 1.0, 1.0])
    found = run(model, chunk_labels=ChunkLabels(labels, coverage, force_cross_entropy=True))
    counts = torch.bincount(labels.flatten(), minlength=4).double()
    rows = []
    for row in range(len(IDS)):
        kept = MASK[row].bool()
        nll = -found.boundary_logits[row, kept].double().log_softmax(-1)
        wanted = labels[row, kept]
        weight = 1 / counts[wanted]
        rows.append((nll[torch.arange(len(wanted)), wanted] * weight).sum() / weight.sum())
    assert found.loss_parts["chunk"].item() == pytest.approx(sum(rows).item() / 3, abs=1e-5)


# --- gates and distillation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "dense", "threshold"])
def test_gate_part_equals_the_formula(mode: str) -> None:
    """Over the probabilities; under threshold gates, over the actions themselves."""
    found = run(lively(), gates=mode, tau=0.5, decode_start=4, skip_target=0.36)
    acts = found.taps.gated_BT
    positions = (MASK.cumsum(1) - 1).clamp_min(0)
    assert torch.equal(acts, (positions >= 4) & MASK.bool())
    rate = found.skip.float() if mode == "threshold" else found.gate_prob
    entropy = (binary_entropy(rate) * acts).sum() / (LAYERS * acts.sum())
    rate_L = (rate * acts).sum((1, 2)) / acts.sum()
    wanted = rate_penalty(rate_L, None, True, 0.36) - 0.01 * entropy
    torch.testing.assert_close(found.loss_parts["gate"], wanted)
    mean = (rate * acts).sum() / (LAYERS * acts.sum())
    assert 0.1 < mean < 0.7


@pytest.mark.parametrize("mode", ["sample", "threshold"])
def test_gate_part_pushes_the_rate_to_its_target(mode: str) -> None:
    for target, sign in ((0.0, 1), (1.0, -1)):
        model = enliven(fresh())
        run(model, gates=mode, tau=0.5, skip_target=target).loss_parts["gate"].backward()
        grads = [g.skip_gate.out.bias.grad for g in model.model.layers if g.skip_gate is not None]
        assert all(sign * grad > 0 for grad in grads)


def test_distillation_is_zero_where_nothing_skips() -> None:
    assert run(lively(), gates="threshold", tau=1.0).loss_parts["distill"] == 0
    assert run(lively(), gates="threshold", tau=0.5).loss_parts["distill"] > 1e-3
    assert "distill" not in run(lively(), gates="dense").loss_parts
    assert "distill" not in run(weighted(distill=0.0)).loss_parts


def test_distillation_pulls_to_the_own_dense_pass_or_a_given_one() -> None:
    model = lively()
    with torch.no_grad():
        dense = model(IDS, MASK, gates="dense").logits
        own, given = run(model), run(model, dense=model.dense_reference(IDS, MASK))
        nothing = DenseReference(torch.zeros(*IDS.shape, 4), torch.zeros(dense.shape[-1], 4))
        other = run(model, dense=nothing)
    assert torch.equal(own.loss_parts["distill"], given.loss_parts["distill"])
    p, q = dense.double().log_softmax(-1), own.logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    wanted = kl[MASK.bool()].mean()
    assert own.loss_parts["distill"].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(other.loss_parts["distill"] - own.loss_parts["distill"]) > 1e-2


def test_every_new_parameter_is_trained() -> None:
    model = enliven(fresh())
    run(model).loss.backward()
    silent = [n for n, p in model.model.new_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_checkpointed_gradients_are_the_same() -> None:
    plain, saving = enliven(fresh()), enliven(fresh())
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model.train()
        run(model).loss.backward()
    for (name, one), (_, other) in zip(
        plain.named_parameters(), saving.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_losses_are_nats_per_token_and_finite_on_any_row() -> None:
    """A row of one token, a row of labels only at the end, a batch without any gated token."""
    ids, mask = left_padded(6, [9, 1])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]
    found = lively()(ids, mask, labels=labels, gates="sample", gate_seed=1, decode_start=50)
    assert all(torch.isfinite(part) for part in found.loss_parts.values())
    assert found.loss_parts["gate"] == 0 and found.loss_parts["distill"] == 0
    nll = -found.logits[0, -2].double().log_softmax(-1)[ids[0, -1]].item()
    assert found.loss_parts["lm"].item() == pytest.approx(nll, abs=1e-5)
    assert math.isfinite(found.loss.item()) and len(list(itertools.chain(found.loss_parts))) == 7
