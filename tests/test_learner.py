"""The PPO learner on tiny real models: what it computes, what it leaves alone, that it learns, that it resumes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fbs_rl.config import from_tree, to_tree
from fbs_rl.gate_bundle import GateParts, gate_tensors
from fbs_rl.model.flops import count_trace
from fbs_rl.rl.collapse import CollapseError, CollapseGuard
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.learner_settings import (
    PRESETS,
    CollapseLimits,
    LearnerSettings,
    MismatchLimits,
    Trains,
)
from fbs_rl.rl.mismatch import MismatchError, MismatchSums
from fbs_rl.rl.ranks import Ranks
from fbs_rl.rl.rollout import EpisodeRollout
from fbs_rl.rl.trainable import frozen_digest, set_trainable
from fbs_rl.rl.update_plan import plan_update
from tests.gate_rollouts import Question, make_episodes, make_questions
from tests.tiny import LAYERS, NOOP, enliven, fresh, lively

FREE = 9.0
"""A KL limit that no gate of these tests reaches."""


def made(**options: Any) -> Any:
    """A model of the test's own, whose modules all act."""
    return enliven(fresh(**options))


def learner(model: Any, ranks: Ranks | None = None, **tree: Any) -> PPOLearner:
    quick = {"lr_gates": 1e-3, "lr_paw": 1e-3, "minibatches": 2, "epochs": 2, "target_kl": None}
    return PPOLearner(model, from_tree(LearnerSettings, {**quick, **tree}), 7, ranks)


@lru_cache
def questions(count: int = 3) -> tuple[Question, ...]:
    return tuple(make_questions(lively(), count, tokens=8))


@lru_cache
def episodes(step: int = 0, protected: float = 0.2) -> tuple[EpisodeRollout, ...]:
    """Three rollouts of three questions under the gates of `lively()`, which `made()` starts with."""
    return tuple(make_episodes(lively(), questions(), 3, step, protected=protected))


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- settings, plan, what trains ------------------------------------------------------------------------------


def test_presets_are_trees_of_settings() -> None:
    assert from_tree(LearnerSettings, PRESETS["default"]) == LearnerSettings()
    paper = from_tree(LearnerSettings, PRESETS["paper"])
    assert paper.has_critic and not paper.dense_is_fixed and not LearnerSettings().has_critic
    assert paper.bundle_parts is GateParts.GATES_AND_PAW
    assert LearnerSettings().bundle_parts is GateParts.GATES and LearnerSettings().dense_is_fixed
    assert from_tree(LearnerSettings, to_tree(paper)) == paper


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"lr_gates": -1.0}, "lr_gates is -1.0; give 0 or more"),
        ({"lr_gates": 0.0}, "nothing would train"),
        ({"target_kl": 0.0}, "null for no early stop"),
        ({"curriculum_frac": 2.0}, "curriculum_frac is 2.0"),
        ({"self_test": {"tokens": 0}}, "self_test.tokens is 0"),
        ({"self_test": {"kl": -1.0}}, "self_test.kl is -1.0"),
        ({"collapse": {"prob_low": 0.6, "prob_high": 0.5}}, "the lower first"),
        ({"collapse": {"patience": 0}}, "collapse.patience is 0"),
        ({"runtime": {"precision": "fp16"}}, "runtime.precision is 'fp16'"),
        ({"runtime": {"threads": 0}}, "runtime.threads is 0"),
        ({"lr_gate": 1.0}, "did you mean lr_gates"),
    ],
)
def test_settings_that_cannot_work_are_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_tree(LearnerSettings, tree)


def test_an_update_is_planned_by_its_number() -> None:
    config = lively().config
    tree = {
        "updates": 11, "never_skip": [-1], "temperature_end": 0.4, "temperature_frac": 0.5,
        "lr_final_frac": 0.0, "entropy_final_frac": 0.5, "curriculum_frac": 0.4,
    }  # fmt: skip
    settings = from_tree(LearnerSettings, tree)
    plans = [plan_update(step, settings, config) for step in (*range(11), 30)]
    assert [p.policy.temperature for p in plans[:6]] == [1.0] * 6
    assert [round(p.policy.temperature, 6) for p in plans[6:]] == [.88, .76, .64, .52, .4, .4]  # fmt: skip
    assert [round(p.lr_scale, 6) for p in plans[::5]] == [1.0, 0.5, 0.0]
    assert [p.entropy_scale for p in plans[::5]] == [1.0, 0.75, 0.5]
    # The middle third of 8 layers is 3 and 4; the boundary layer is 2; the last never skips.
    assert plans[0].never_skip == (0, 1, 2, 5, 6, 7) and plans[0].deciding == (3, 4)
    assert plans[5].never_skip == (2, 7) and plans[5].deciding == (0, 1, 3, 4, 5, 6)
    free = [len(plan.deciding) for plan in plans]
    assert free == sorted(free)
    with pytest.raises(ValueError, match="no layer may skip in update 0"):
        plan_update(0, replace(settings, never_skip=tuple(range(LAYERS))), config)


def test_what_trains_is_what_a_bundle_carries() -> None:
    model = made()
    for trains, parts in ((Trains.GATES, "gates"), (Trains.GATES_AND_PAW, "gates+paw")):
        found = set_trainable(model, trains)
        wanted = gate_tensors(model, parts)
        assert found.keys() == wanted.keys()
        assert all(found[name] is wanted[name] for name in wanted)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == found.keys()
    window = set_trainable(model, Trains.GATES_AND_WINDOW).keys()
    extra = {name.split(".paw.")[1] for name in window if ".skip_gate." not in name}
    assert extra == {"window_in.weight", "window_out.weight", "window_out.bias"}


def test_models_without_the_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="no gates to train"):
        set_trainable(fresh(gate=False), Trains.GATES)
    with pytest.raises(ValueError, match="no such part of PAW; set trains to gates"):
        set_trainable(fresh(paw_window="fixed"), Trains.GATES_AND_WINDOW)


def test_the_digest_sees_every_frozen_tensor_and_no_trained_one() -> None:
    model = made()
    trained = set_trainable(model, Trains.GATES)
    before = frozen_digest(model, trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
        assert frozen_digest(model, trained) == before
        for name in ("model.norm.weight", "model.layers.4.paw.strength", "model.preview.log_prior_N"):  # fmt: skip
            tensor = model.state_dict()[name]
            tensor.flatten()[0].add_(1e-3)
            assert frozen_digest(model, trained) != before
            tensor.flatten()[0].sub_(1e-3)


# --- self-test ------------------------------------------------------------------------------------------------


def test_the_self_test_passes_on_own_rollouts_and_fails_on_others() -> None:
    whole, limits = episodes(), MismatchLimits(logp_max=1e-4, kl=1e-8, flip_frac=0.0)
    own = learner(made()).self_test(whole, limits)
    traces = [segment.trace for episode in whole for segment in episode.segments]
    assert own.columns == sum(int((t.protected_T == 0).sum()) for t in traces)
    assert own.decisions == own.columns * (LAYERS - 1)
    with pytest.raises(ValueError, match=f"saw {own.columns} gate columns and needs 5000"):
        learner(made()).self_test(whole, replace(limits, tokens=5000))
    model = made()
    with torch.no_grad():
        model.model.layers[4].skip_gate.out.bias += 0.3
    with pytest.raises(
        MismatchError, match=r"their \|Δ log p\| is 0\.\d+, above 0\.0001; give both"
    ):
        learner(model).self_test(whole, limits)
    # The gates agree, but decisions were drawn with another policy than the plan's.
    other = learner(made(), policy={"low": 0.3, "high": 0.7})
    with pytest.raises(MismatchError, match="share of flipped decisions"):
        other.self_test(whole, MismatchLimits(logp_max=1e-4, kl=1e-8, flip_frac=0.02))


def test_mismatch_figures_by_hand() -> None:
    policy = GatePolicy(low=0.1, high=0.9)  # p_b = 0.1 + 0.8 p
    theirs, mine = torch.tensor([0.5, 0.5, 0.25, 0.0]), torch.tensor([0.5, 0.75, 0.25, 0.9])
    skip, uniform = torch.tensor([True, False, True, True]), torch.tensor([0.4, 0.55, 0.2, 0.5])
    decides = torch.tensor([True, True, True, False])
    sums = MismatchSums(torch.device("cpu"))
    whole = (decides, skip, theirs, mine, uniform)
    for part in (slice(0, 1), slice(1, 4)):
        one, two, three, four, five = (tensor[part].view(1, 1, -1) for tensor in whole)
        sums.add(one, two, three, four, five, policy)
    found = sums.total(Ranks())
    # Only the second decision differs: p_b 0.5 against 0.7; at u = 0.55 it would skip instead of run.
    kl = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3)
    assert (found.columns, found.decisions) == (3, 3)
    assert found.logp_max == pytest.approx(math.log(0.5 / 0.3))
    assert found.kl == pytest.approx(kl / 3, rel=1e-5)
    assert found.flip_rate == pytest.approx(1 / 3)
    broken = replace(found, columns=64, logp_max=math.nan)
    with pytest.raises(MismatchError, match="is nan"):
        broken.check(MismatchLimits())


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
    wild = learner(made(), lr_gates=1e37, lr_paw=1e37, minibatches=1, epochs=1, collapse={"kl_max": FREE})  # fmt: skip
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


# --- collapse ----------------------------------------------------------------------------------------------------


def test_the_guard_counts_updates_in_a_row() -> None:
    guard = CollapseGuard(CollapseLimits(patience=3))
    for prob in (0.999, 0.999, 0.5, 0.999, 0.001):
        guard.check({0: 0.5, 4: prob}, 0.1)
    with pytest.raises(CollapseError, match=r"layer 4 .* for 3 updates \(now 0\.9980\)"):
        guard.check({0: 0.5, 4: 0.998}, 0.1)
    with pytest.raises(CollapseError, match=r"0\.600 nats a decision from the reference, above 0\.5"):  # fmt: skip
        CollapseGuard(CollapseLimits()).check({0: 0.5}, 0.6)


def test_a_gate_that_always_skips_ends_the_run() -> None:
    model = made()
    with torch.no_grad():
        model.model.layers[5].skip_gate.out.bias.fill_(60.0)
    stuck = learner(model, collapse={"patience": 2})
    whole = make_episodes(model, questions(), 2)
    stuck.update(whole, 0)
    with pytest.raises(CollapseError, match="the gate of layer 5 "):
        stuck.update(whole, 1)


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_learner_resumed_from_its_state_is_the_one_left_alone(preset: str) -> None:
    """To the bit, figures and weights."""

    def run(told: PPOLearner, steps: range) -> list[tuple[str, dict[str, Any]]]:
        return [(told.bundle(0).digest, told.update(episodes(step), step)) for step in steps]

    whole = learner(made(), **PRESETS[preset])
    found = run(whole, range(1))
    state = saved(whole.state_dict())
    wanted = run(whole, range(1, 3))
    again = learner(made(), **PRESETS[preset])
    again.load_state_dict(state)
    assert run(again, range(1, 3)) == wanted
    assert again.bundle(0).digest == whole.bundle(0).digest
    assert again.counters == whole.counters and again.counters["updates"] == 3
    assert len({digest for digest, _ in found + wanted}) == 3


def test_states_of_other_learners_are_refused() -> None:
    state = saved(learner(made()).state_dict())
    with pytest.raises(ValueError, match="belongs to another backbone"):
        learner(enliven(fresh(), seed=6)).load_state_dict(state)
    with pytest.raises(ValueError, match="had seed 7, not 8"):
        PPOLearner(made(), LearnerSettings(), 8).load_state_dict(state)
    with pytest.raises(ValueError, match="trained other parameters"):
        critic = {"credit": "episode", "baseline": "critic"}
        learner(made(), advantages=critic).load_state_dict(state)


def test_a_reference_can_be_given() -> None:
    other = enliven(fresh(), seed=6)
    told = learner(made(), collapse={"kl_max": FREE})
    told.load_reference(gate_tensors(other, "gates"))
    assert told.update(episodes(), 0)["ppo/kl_ref"] > 0.01
    with pytest.raises(ValueError, match="the reference differs in"):
        told.load_reference(gate_tensors(other, "gates+paw"))
