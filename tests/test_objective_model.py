"""The objective as the model computes it: which parts there are, how they are weighed, what they train."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import pytest
import torch

from fbs_rl.model.objective import (
    gate_loss,
    horizon_targets,
    language_model_loss,
    preview_cross_entropy,
    preview_loss,
    window_loss,
)
from fbs_rl.types import ChunkLabels
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
    assert torch.equal(found.loss_parts["lm"], language_model_loss(found.logits, LABELS))


def test_preview_part_scores_the_drawn_layers() -> None:
    model = lively(paw_layers="all", loss_preview_taps=3)
    losses = set()
    for seed in range(4):
        with torch.no_grad():
            found = run(model, loss_seed=seed)
            drawn = random.Random(seed).sample(found.taps.previews, 3)
            targets, known = horizon_targets(IDS, 5, MASK.bool())
            reduced = model.model.preview.reduced_embedding(model.model.embed_tokens.weight)
            preview, window = 0.0, 0.0
            for tap in drawn:
                ce = preview_cross_entropy(model.model.preview, tap, reduced, targets, known)
                preview += preview_loss(ce, tap.inclusion_BTK, known).item() / 3
                window += window_loss(ce, tap, known, 2.5, 0.54).item() / 3
        assert found.loss_parts["preview"].item() == pytest.approx(preview, abs=1e-6)
        assert found.loss_parts["window"].item() == pytest.approx(window, abs=1e-6)
        losses.add(found.loss_parts["preview"].item())
    assert len(losses) > 1


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
            deep = torch.stack([final[row, owner == j].mean(0) for j in range(count)])
            guess = chunks.summaries[layer][row, :count].double() @ weight.T
            cosine = torch.cosine_similarity(guess[:, None], deep[None], dim=-1)
            for j in range(count):
                if kind == "cosine":
                    terms.append(1 - cosine[j, j].item())
                else:
                    terms.append(-(cosine[j] / 0.07).log_softmax(0)[j].item())
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
    torch.testing.assert_close(found.loss_parts["gate"], gate_loss(rate, acts, 0.36))
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
        own, given = run(model), run(model, dense_logits=dense)
        other = run(model, dense_logits=torch.zeros_like(dense))
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
