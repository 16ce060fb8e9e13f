"""What gates read, kept: the same probabilities and gradients as replays, without running the model again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fbs_rl.rl.gate_views import see, view_bytes
from fbs_rl.rl.ppo_loss import deciding_layers, decision_mask
from fbs_rl.rl.replay import ReplayBatch, cut_batches, replay
from fbs_rl.rl.update_batches import UpdateSegments
from tests.gate_rollouts import make_episodes, make_questions
from tests.learners import episodes, learner, made
from tests.tiny import LAYERS, NOOP, fresh, lively

VARIANTS: list[dict[str, Any]] = [
    {},
    {"gate_block": 3},
    {"gate_ahead": 1},
    {"paw": False, "chunk": False, "gate_inputs": "residual"},
    {"gate_inputs": "preview"},
    NOOP,
]
NAMES = ["default", "blocks", "ahead", "residual", "preview", "noop"]
NEVER = (5,)


def padded_batch(model: Any) -> ReplayBatch:
    """Segments of uneven length in one batch."""
    drawn = make_episodes(
        model, make_questions(model, 2, tokens=7), 2, never_skip=NEVER, protected=0.2
    )
    segments = UpdateSegments.of(drawn).segments
    [batch] = cut_batches(segments, range(len(segments)), 10_000)
    assert not bool((batch.place_BC > 0).all())
    return batch


@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_gates_say_of_their_views_what_they_say_in_a_replay(options: dict[str, Any]) -> None:
    """Their own weights, and those of a reference; layers that never skip are 0 in both, padding is in the views'."""
    model, other = lively(**options), fresh(**options)
    batch = padded_batch(model)
    theirs = {n: p.detach() for n, p in other.named_parameters() if ".skip_gate." in n}
    views = see(model, batch, NEVER)
    with torch.no_grad():
        found = [views.probabilities(model, NEVER, tensors) for tensors in (None, theirs)]
        wanted = [replay(model, batch, NEVER, tensors).prob_LBC for tensors in (None, theirs)]
    column_BC = batch.place_BC > 0
    for ours, replayed in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, replayed * column_BC, atol=1e-6, rtol=0)
        assert torch.equal(ours == 0, (replayed == 0) | ~column_BC)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_their_gradients_are_those_of_a_replay(options: dict[str, Any]) -> None:
    def gradients(seen: bool) -> dict[str, Tensor]:
        model = made(**options)
        model.requires_grad_(False)
        gates = {n: p for n, p in model.named_parameters() if ".skip_gate." in n}
        for parameter in gates.values():
            parameter.requires_grad_(True)
        batch = padded_batch(model)
        views = see(model, batch, NEVER)
        prob_LBC = (
            views.probabilities(model, NEVER) if seen else replay(model, batch, NEVER).prob_LBC
        )
        deciding = deciding_layers(
            LAYERS, model.config.gate_block, model.config.forced_layers(NEVER)
        )
        weight_LBC = torch.linspace(-1, 1, prob_LBC.numel()).view_as(prob_LBC)
        (prob_LBC * weight_LBC)[decision_mask(LAYERS, deciding, batch.free_BC)].sum().backward()
        return {n: p.grad for n, p in gates.items() if p.grad is not None}

    ours, replayed = gradients(seen=True), gradients(seen=False)
    assert ours.keys() == replayed.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, replayed[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", VARIANTS, ids=NAMES)
def test_what_they_take_is_counted(options: dict[str, Any]) -> None:
    model = lively(**options)
    batch = padded_batch(model)
    views = see(model, batch)
    tensors: dict[int, Tensor] = {}
    inputs = model.config.gate_inputs
    for normed, motion, sight in views.of_layer.values():
        if inputs != "preview":
            tensors |= {id(t): t for t in (normed, motion)}
        if sight is not None and inputs != "residual":
            tensors |= {id(t): t for t in (sight.pooled_BTE, sight.entropy_BT)}
    taken = sum(t.numel() * t.element_size() for t in tensors.values())
    assert taken == view_bytes(model.config, batch.place_BC.numel(), 4)


@pytest.mark.parametrize(
    "advantages", [{}, {"credit": "to_go", "baseline": "critic"}], ids=["no critic", "critic"]
)
def test_an_update_runs_the_model_once_a_call(advantages: dict[str, str]) -> None:
    """The same update as with replays throughout, which run it for the reference and in every epoch too."""
    found = []
    for kept_gib in (4.0, 0.0):
        runtime = {"gate_views_gib": kept_gib}
        trainee = learner(made(), advantages=advantages, epochs=3, micro_tokens=40, runtime=runtime)
        passes: list[int] = []
        trainee.model.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        metrics = trainee.update(episodes(), 0)
        found.append((metrics, len(passes), trainee.bundle(0).tensors))
    (kept, once, ours), (replayed, often, theirs) = found
    assert often == (2 + 3) * once > 0
    assert kept["ppo/ratio_max"] > 1 and kept["train/optimizer_steps"] == 6
    for name in ("ppo/loss", "ppo/kl_ref", "train/grad_norm", "mismatch/kl"):
        assert kept[name] == pytest.approx(replayed[name], abs=1e-5), name
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)
