"""Updates of the PPO learner on tiny real models: what one computes, what it leaves alone, that it learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fbs_rl.model.flops import count_trace
from fbs_rl.rl.collapse import CollapseError
from fbs_rl.rl.learner_settings import PRESETS, LearnerSettings, Trains
from fbs_rl.rl.rollout import EpisodeRollout
from fbs_rl.rl.trainable import set_trainable
from fbs_rl.rl.update_plan import plan_update
from tests.gate_rollouts import make_episodes, make_questions
from tests.learners import FREE, episodes, learner, made, questions
from tests.tiny import LAYERS, NOOP, lively

# --- an update --------------------------------------------------------------------------------------------------


def test_before_the_first_step_nothing_has_moved() -> None:
    """Ratios are exactly 1 and so is the reference, whatever the batches."""
    for micro_tokens in (16, 50, 10_000):
        once = learner(made(), epochs=1, minibatches=1, micro_tokens=micro_tokens)
        metrics = once.update(episodes(), 0)
        assert metrics["ppo/ratio_max"] == 1.0
        assert metrics["ppo/approx_kl"] == metrics["ppo/clip_frac"] == metrics["ppo/kl_ref"] == 0.0


def gradient_by_hand(whole: Sequence[EpisodeRollout], analytic: bool) -> float:
    """Norm of the first gradient, one segment at a time, from the definitions: R − mean R for every decision."""
    model = made()
    gates = [p for p in set_trainable(model, Trains.GATES).values()]
    rewards, saved, rows = [], [], []
    for index, episode in enumerate(whole):
        costs, penalties = [], []
        for segment in episode.segments:
            skip_L1T = torch.from_numpy(segment.trace.skip_TL.T.copy()).unsqueeze(1)
            start_1 = torch.tensor([len(segment.prompt_ids)])
            closed, opens = (
                torch.from_numpy(x)[None] for x in (segment.trace.chunks_T, segment.trace.closes_T)
            )
            costs.append(count_trace(model.config, skip_L1T, start_1, True, closed, opens))
            penalties.append(np.clip(segment.nll_gated_N - segment.nll_dense_N, -1, 5))
            rows.append((index, segment))
        dense = sum(int(cost.dense_flops_BT.sum()) for cost in costs)
        spent = sum(int(cost.flops_BT.sum()) for cost in costs)
        quality = -0.1 * float(np.concatenate(penalties).mean())
        rewards.append(quality if analytic else 0.1 * (1 - spent / dense) + quality)
        saved.append(0.1 / dense)
    mean = float(np.mean([rewards[index] for index, _ in rows]))
    total, decisions = torch.zeros(()), 0
    for index, segment in rows:
        start, acts_T = len(segment.prompt_ids), torch.from_numpy(segment.trace.protected_T == 0)
        ids = torch.tensor([[*segment.prompt_ids, *segment.token_ids]])
        skip_L1T = torch.zeros(LAYERS, *ids.shape, dtype=torch.bool)
        skip_L1T[:, 0, start:-1] = torch.from_numpy(segment.trace.skip_TL.T.copy())
        prob_LT = model(ids, gates="replay", skip=skip_L1T, decode_start=start).gate_prob[:, 0]
        for layer in set(range(LAYERS)) - {2}:
            prob_T = 0.02 + 0.96 * prob_LT[layer, start:-1][acts_T]
            skip_T = skip_L1T[layer, 0, start:-1][acts_T]
            logp_T = torch.where(skip_T, prob_T.log(), (1 - prob_T).log())
            total = total + (rewards[index] - mean) * logp_T.sum()
            decisions += len(logp_T)
            if analytic:
                chunks_T = torch.from_numpy(segment.trace.chunks_T)
                places_T = torch.arange(start, start + len(acts_T))
                gain_T = saved[index] * savings(model, layer, places_T + 1, chunks_T)
                total = total + (gain_T[acts_T] * prob_T).sum()
    (total / decisions).backward()
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in gates if p.grad is not None))  # fmt: skip


def savings(model: Any, layer: int, keys_T: Tensor, chunks_T: Tensor) -> Tensor:
    """FLOPs of the layer less those of its adapter and of keys and values, at each column."""
    config = model.config
    nothing = torch.zeros(LAYERS, 1, 1, dtype=torch.bool)
    found = []
    for keys, chunks in zip(keys_T.tolist(), chunks_T.tolist(), strict=True):
        one = nothing.clone()
        one[layer] = True
        place = (torch.tensor([keys - 1]), True, torch.tensor([[chunks]]), torch.tensor([[False]]))
        run, skipped = (count_trace(config, z, *place).flops_BT for z in (nothing, one))
        found.append(int(run - skipped))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("credit", ["sampled", "analytic"])
def test_the_gradient_is_the_one_written_out_by_hand(credit: str) -> None:
    whole = make_episodes(lively(), questions(), 2, protected=0.2)
    tree = {
        "epochs": 1, "minibatches": 1, "compute_credit": credit,
        "advantages": {"credit": "episode", "baseline": "batch", "scale": "none"},
        "loss": {"entropy_coef": 0.0},
    }  # fmt: skip
    norm = learner(made(), **tree).update(whole, 0)["train/grad_norm"]
    assert norm == pytest.approx(gradient_by_hand(whole, credit == "analytic"), rel=1e-4)


def test_weights_do_not_depend_on_how_a_step_is_cut() -> None:
    found = []
    for micro_tokens in (1, 40, 10_000):
        made_learner = learner(made(), micro_tokens=micro_tokens)
        metrics = made_learner.update(episodes(), 0)
        weights = made_learner.bundle(0).tensors
        found.append((metrics["ppo/loss"], metrics["train/grad_norm"], weights))
    for loss, norm, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        assert norm == pytest.approx(found[0][1], rel=1e-4)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, found[0][2][name], atol=2e-5, rtol=0)


def test_figures_of_the_rollouts_by_hand() -> None:
    metrics = learner(made()).update(episodes(), 0)
    traces = [s.trace for e in episodes() for s in e.segments]
    skip_NL = np.concatenate([t.skip_TL for t in traces])
    costs = [t.cost(lively().config) for t in traces]
    spent, dense = (sum(int(getattr(c, n).sum()) for c in costs) for n in ("flops_BT", "dense_flops_BT"))  # fmt: skip
    assert metrics["gate/skip_rate"] == pytest.approx(skip_NL.mean())
    assert metrics["gate/skip_layer_3"] == pytest.approx(skip_NL[:, 3].mean())
    assert metrics["gate/skip_layer_2"] == 0.0
    assert metrics["gate/executed_flops_frac"] == pytest.approx(spent / dense)
    assert sum(metrics["gate/prob_histogram"]) == metrics["train/decisions"]
    acts_N = np.concatenate([t.protected_T == 0 for t in traces])
    prob_NL = np.concatenate([t.prob_TL for t in traces])
    assert metrics["gate/prob_layer_3"] == pytest.approx(prob_NL[acts_N, 3].mean(), rel=1e-4)
    assert metrics["reward/total"] == pytest.approx(
        metrics["reward/compute_term"] + metrics["reward/quality_term"]
    )
    assert metrics["reward/compute_term"] == pytest.approx(0.1 * metrics["reward/compute_saved_frac"])  # fmt: skip
    assert metrics["mismatch/logp_max"] < 1e-4 and metrics["mismatch/flip_rate"] == 0.0
    assert metrics["train/optimizer_steps"] == 4 and metrics["train/bad_steps"] == 0


@pytest.mark.parametrize("options", [{"gate_block": 3}, NOOP], ids=["blocks", "noop"])
def test_other_kinds_of_model_take_updates(options: dict[str, Any]) -> None:
    model = made(**options)
    whole = make_episodes(model, questions(), 2)
    metrics = learner(model, micro_tokens=60).update(whole, 0)
    deciding = plan_update(0, LearnerSettings(), model.config).deciding
    assert metrics["train/decisions"] == metrics["gate/columns"] * len(deciding)
    assert metrics["mismatch/flip_rate"] == 0.0 and metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("trains", list(Trains))
def test_the_dense_pass_stays_with_gates_alone(trains: Trains) -> None:
    model, ids = made(), torch.tensor([list(range(3, 20))])
    before = model(ids).logits
    told = learner(model, trains=str(trains))
    start = told.bundle(0)
    told.update(episodes(), 0)
    told.check_frozen()
    moved = [n for n, t in told.bundle(1).tensors.items() if not torch.equal(t, start.tensors[n])]
    assert any(".skip_gate.preview." in name for name in moved)
    assert any(".paw." in name for name in moved) == (trains is not Trains.GATES)
    assert torch.equal(model(ids).logits, before) == told.settings.dense_is_fixed
    with torch.no_grad():
        model.model.norm.weight += 1e-3
    with pytest.raises(RuntimeError, match="tensors changed that trains=gates"):
        told.check_frozen()


def test_the_papers_preset_fits_values() -> None:
    """Of one batch again and again: the value head finds what the returns were."""
    model = made()
    pay = {"quality": "gold", "beta": 1.0}
    paper = learner(model, **{**PRESETS["paper"], "lr_value": 1e-2, "reward": pay})
    found = [paper.update(episodes(), step) for step in range(6)]
    assert found[0]["value/explained_var"] == pytest.approx(0.0)
    assert found[-1]["value/loss"] < 0.5 * found[0]["value/loss"]
    assert found[-1]["value/explained_var"] > 0.2


def test_an_epoch_that_went_too_far_is_the_last_one() -> None:
    assert learner(made(), epochs=3).update(episodes(), 0)["ppo/epochs"] == 3
    assert learner(made(), epochs=3, target_kl=1e-9).update(episodes(), 0)["ppo/epochs"] == 1


def test_bfloat16_gates_keep_what_a_step_adds() -> None:
    """Steps of 1e-6 are below the weights' resolution; the float32 weights behind them add up."""
    model = made().to(torch.bfloat16)
    rate = 1e-6
    slow = learner(model, lr_gates=rate, lr_paw=rate)
    start = {name: p.detach().clone() for name, p in slow.trained.items()}
    slow.update(episodes(), 0)
    name = "model.layers.4.skip_gate.hidden.weight"
    master = slow.weights.masters[name].detach()
    assert torch.equal(slow.trained[name], master.bfloat16())
    moved = (master - start[name].float()).abs()
    assert 0 < float(moved.max()) <= 4.2 * rate
    assert float((slow.trained[name] != start[name]).float().mean()) < 0.05


def test_a_step_that_is_not_finite_is_not_applied() -> None:
    """A learning rate that throws the gates out of float32's range; from then on nothing moves."""
    limits = {"kl_max": FREE, "patience": 4}
    wild = learner(made(), lr_gates=1e37, lr_paw=1e37, minibatches=1, epochs=1, collapse=limits)
    steps = [wild.update(episodes(), 0)["train/bad_steps"], 0]
    digest = wild.bundle(0).digest
    with pytest.raises(CollapseError):
        for step in range(1, 6):
            steps.append(wild.update(episodes(), step)["train/bad_steps"])
            assert wild.bundle(0).digest == digest
    assert steps[0] == 0 and wild.counters["bad_steps"] >= 3


def test_episodes_that_cannot_be_used_are_refused() -> None:
    whole = list(episodes())
    segment = whole[0].segments[0]
    with pytest.raises(ValueError, match="9 episodes hold no gate column"):
        bare = replace(
            segment, token_ids=segment.token_ids[:1], nll_gated_N=segment.nll_gated_N[:1],
            nll_dense_N=segment.nll_dense_N[:1], trace=segment.trace.first(0),
        )  # fmt: skip
        learner(made()).update([replace(e, segments=(bare,)) for e in whole], 0)
    with pytest.raises(ValueError, match="an NLL that is not finite"):
        endless = replace(segment, nll_gated_N=segment.nll_gated_N + math.inf)
        whole[0] = replace(whole[0], segments=(endless, *whole[0].segments[1:]))
        learner(made()).update(whole, 0)
    with pytest.raises(ValueError, match="sample each prompt twice or more"):
        learner(made()).update([e for e in episodes() if e.sample == 0], 0)


# --- learning ----------------------------------------------------------------------------------------------------


def skip_rates(updates: int, **tree: Any) -> list[float]:
    """Skip rate over all layers, update by update, each with rollouts of its own."""
    loose = {
        "updates": updates, "lr_gates": 6e-3, "lr_paw": 6e-3, "minibatches": 1, "temperature_end": 1.0,
        "loss": {"kl_coef": 0.0, "entropy_coef": 0.0}, "collapse": {"kl_max": FREE},
    }  # fmt: skip
    model = made(chunk=False)
    asked = make_questions(model, 4, tokens=8)
    told = learner(model, **loose, **tree)
    found = []
    for step in range(updates):
        drawn = make_episodes(model, asked, 5, step, told.plan(step).policy)
        found.append(told.update(drawn, step)["gate/skip_rate"])
    return found


@pytest.mark.parametrize("credit", ["analytic", "sampled"])
def test_gates_paid_for_compute_alone_skip_more(credit: str) -> None:
    found = skip_rates(5, compute_credit=credit, reward={"beta": 1.0, "lam": 0.0})
    assert found[-1] > found[0] + 0.15, found


def test_gates_paid_for_quality_alone_skip_less() -> None:
    """Without pay for being better than the dense pass, which on a few fixed tokens gates can learn to be."""
    found = skip_rates(10, reward={"beta": 0.0, "lam": 1.0, "only_increase": True})
    assert found[-1] < found[0] - 0.1, found
