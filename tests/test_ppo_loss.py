"""The PPO loss against cleanrl's formulas on a flat batch, autograd against derivatives by hand, and replay."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from fbs_rl.rl.gate_policy import GatePolicy, ProbabilityBound
from fbs_rl.rl.ppo_loss import (
    LossInputs,
    PPOLossSettings,
    Ratio,
    StepCounts,
    ValueInputs,
    deciding_layers,
    decision_mask,
    log_probability,
    ppo_loss,
)
from tests.loss_inputs import BARE, COLUMNS, POLICY, ROWS, SHAPE, draw, random_inputs, some_mask
from tests.tiny import lively


def cleanrl_loss(
    new_logp: Tensor, old_logp: Tensor, advantage: Tensor, entropy: Tensor, options: PPOLossSettings
) -> tuple[Tensor, dict[str, float]]:
    """The policy part of cleanrl's ppo.py, on flat tensors of one action an entry, without norm_adv."""
    logratio = new_logp - old_logp
    ratio = logratio.exp()
    loss_1 = -advantage * ratio
    loss_2 = -advantage * torch.clamp(ratio, 1 - options.clip, 1 + options.clip)
    pg_loss = torch.max(loss_1, loss_2).mean()
    loss = pg_loss - options.entropy_coef * entropy.mean()
    return loss, {
        "ppo/approx_kl": ((ratio - 1) - logratio).mean().item(),
        "ppo/clip_frac": ((ratio - 1.0).abs() > options.clip).float().mean().item(),
        "ppo/policy_loss": pg_loss.item(),
        "ppo/entropy": entropy.mean().item(),
    }


def flat_oracle(
    logit_LBT: Tensor, inputs: LossInputs, options: PPOLossSettings
) -> tuple[Tensor, dict[str, float]]:
    """Units gathered one at a time by loops, then cleanrl's loss; every p must lie inside the bounds."""
    gates = Bernoulli(logits=logit_LBT)
    new_LBT, entropy_LBT = gates.log_prob(inputs.skip_LBT.float()), gates.entropy()
    units: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for layer, row, t in inputs.decides_LBT.nonzero().tolist():
        key = {Ratio.GATE: (layer, row, t), Ratio.TOKEN: (row, t), Ratio.JOINT: (row,)}
        units.setdefault(key[options.ratio], []).append((layer, row, t))
    new, old, advantage = [], [], []
    for places in units.values():
        new.append(torch.stack([new_LBT[place] for place in places]).sum())
        old.append(torch.stack([inputs.old_logp_LBT[place] for place in places]).sum())
        columns = sorted({place[1:] for place in places})
        advantage.append(torch.stack([inputs.advantage_BT[column] for column in columns]).mean())
    stacked = torch.stack(new), torch.stack(old), torch.stack(advantage)
    return cleanrl_loss(*stacked, entropy_LBT[inputs.decides_LBT], options)


# --- cleanrl ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("masked", [False, True])
def test_loss_gradient_and_metrics_are_cleanrls(ratio: Ratio, masked: bool) -> None:
    options = PPOLossSettings(ratio=ratio, entropy_coef=0.01)
    logit_LBT, inputs = random_inputs()
    if masked:
        inputs = replace(inputs, decides_LBT=some_mask())
    found = ppo_loss(inputs, options, POLICY)
    wanted, metrics = flat_oracle(logit_LBT, inputs, options)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, value in metrics.items():
        assert found.metrics[name].item() == pytest.approx(value, rel=1e-4), name
    assert metrics["ppo/clip_frac"] > 0.0
    (gradient,) = torch.autograd.grad(found.loss, logit_LBT)
    (expected,) = torch.autograd.grad(wanted, logit_LBT)
    assert torch.allclose(gradient, expected, atol=1e-6) and expected.abs().max() > 1e-3


@pytest.mark.parametrize("clip", [None, 0.1])
def test_value_loss_is_cleanrls(clip: float | None) -> None:
    value_BT, old_BT, target_BT = draw(3, ROWS, COLUMNS, seed=5)
    value_BT.requires_grad_()
    decides_LBT = some_mask()
    _, inputs = random_inputs(
        decides_LBT=decides_LBT, values=ValueInputs(value_BT, old_BT, target_BT)
    )
    options = PPOLossSettings(value_clip=clip, value_coef=0.7)
    found = ppo_loss(inputs, options, POLICY)
    columns = decides_LBT.any(0)
    newvalue, old, returns = value_BT[columns], old_BT[columns], target_BT[columns]
    v_loss_unclipped = (newvalue - returns) ** 2
    v_loss = 0.5 * v_loss_unclipped.mean()
    if clip is not None:
        v_clipped = old + torch.clamp(newvalue - old, -clip, clip)
        v_loss = 0.5 * torch.max(v_loss_unclipped, (v_clipped - returns) ** 2).mean()
    assert found.metrics["value/loss"].item() == pytest.approx(v_loss.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.loss, value_BT)
    (expected,) = torch.autograd.grad(0.7 * v_loss, value_BT)
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_divergence_from_the_reference_is_torchs() -> None:
    reference_LBT = draw(*SHAPE, seed=9).sigmoid()
    decides_LBT = some_mask()
    logit_LBT, inputs = random_inputs(decides_LBT=decides_LBT)
    with_reference = replace(inputs, reference_LBT=reference_LBT)
    options = PPOLossSettings(kl_coef=0.3)
    found = ppo_loss(with_reference, options, POLICY)
    divergence = kl_divergence(Bernoulli(logits=logit_LBT), Bernoulli(reference_LBT))
    wanted = divergence[decides_LBT].mean()
    assert found.metrics["ppo/kl_ref"].item() == pytest.approx(wanted.item(), rel=1e-4)
    without = ppo_loss(inputs, options, POLICY)
    assert (found.loss - without.loss).item() == pytest.approx(0.3 * wanted.item(), rel=1e-4)


def test_entropy_scale_is_a_factor_on_the_bonus() -> None:
    _, inputs = random_inputs()
    options = PPOLossSettings(entropy_coef=0.2)
    whole, half, none = (ppo_loss(inputs, options, POLICY, scale) for scale in (1.0, 0.5, 0.0))
    bonus = 0.2 * whole.metrics["ppo/entropy"]
    assert torch.allclose(none.loss - whole.loss, bonus)
    assert torch.allclose(none.loss - half.loss, bonus / 2)


# --- replay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("bound", list(ProbabilityBound))
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_replay_has_ratios_of_exactly_one(
    ratio: Ratio, bound: ProbabilityBound, temperature: float
) -> None:
    policy = GatePolicy(bound=bound, temperature=temperature)
    logit_LBT = (4 * draw(*SHAPE)).requires_grad_()  # many beyond the bounds
    prob_LBT, skip_LBT = logit_LBT.sigmoid(), draw(*SHAPE, seed=1) > 0
    old_LBT = log_probability(policy.probability(prob_LBT), skip_LBT).detach()
    advantage_BT = draw(ROWS, COLUMNS, seed=2)
    inputs = LossInputs(prob_LBT, skip_LBT, old_LBT, some_mask(), advantage_BT)
    found = ppo_loss(inputs, replace(BARE, ratio=ratio), policy).metrics
    assert found["ppo/ratio_max"] == 1.0 and found["ppo/approx_kl"] == 0.0
    assert found["ppo/clip_frac"] == 0.0


def test_replayed_decisions_of_the_model_have_ratios_of_exactly_one() -> None:
    """Sampled by the parallel pass, replayed by it, with gates in blocks and a boundary layer that never skips."""
    model = lively(gate_block=3)
    config = model.config
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        made = model(ids, gates="sample", decode_start=4, gate_seed=torch.tensor([1, 2]))
    replayed = model(ids, gates="replay", decode_start=4, skip=made.skip)
    deciding = deciding_layers(config.layer_count, config.gate_block, config.forced_layers())
    columns_BT = (torch.arange(12) >= 4).expand(2, 12)
    decides_LBT = decision_mask(config.layer_count, deciding, columns_BT)
    policy = GatePolicy(low=1e-5, high=1 - 1e-5, bound=ProbabilityBound.CLIP)
    old_LBT = log_probability(policy.probability(made.gate_prob), made.skip)
    assert torch.isfinite(old_LBT[decides_LBT]).all()
    inputs = LossInputs(replayed.gate_prob, made.skip, old_LBT, decides_LBT, draw(2, 12))
    found = ppo_loss(inputs, BARE, policy)
    assert found.metrics["ppo/ratio_max"] == 1.0
    assert 0.0 < found.metrics["gate/skip_rate"] < 1.0
    gates = [p for name, p in model.named_parameters() if ".skip_gate." in name]
    gradients = torch.autograd.grad(found.loss, gates, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


# --- bounds -----------------------------------------------------------------------


def test_clipped_bounds_stop_the_surrogate_and_mixed_ones_do_not() -> None:
    logit = torch.tensor([-5.5, -1.0, 1.0, 5.5], requires_grad=True)
    shape = (4, 1, 1)
    for bound, wanted in [
        (ProbabilityBound.CLIP, [False, True, True, False]),
        (ProbabilityBound.MIX, [True] * 4),
    ]:
        policy = GatePolicy(bound=bound)
        prob_LBT = logit.sigmoid().view(shape)
        skip_LBT = torch.ones(shape, dtype=torch.bool)
        old_LBT = log_probability(policy.probability(prob_LBT), skip_LBT).detach()
        reference_LBT = torch.full(shape, 0.5)
        inputs = LossInputs(prob_LBT, skip_LBT, old_LBT, skip_LBT, torch.ones(1, 1), reference_LBT)
        found = ppo_loss(inputs, BARE, policy)
        (gradient,) = torch.autograd.grad(found.loss, logit, retain_graph=True)
        assert (gradient != 0).tolist() == wanted
        assert (gradient <= 0).all()  # a skip that paid is made likelier
        at_bound = 0.5 if bound is ProbabilityBound.CLIP else 0.0
        assert found.metrics["gate/at_bound_frac"] == at_bound
        # The way back: KL and entropy are of p itself.
        for options in (PPOLossSettings(entropy_coef=0.0), PPOLossSettings(kl_coef=0.0)):
            still = replace(inputs, advantage_BT=torch.zeros(1, 1))
            (gradient,) = torch.autograd.grad(
                ppo_loss(still, options, policy).loss, logit, retain_graph=True
            )
            assert (gradient * logit > 0).all()


# --- masks and counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", list(Ratio))
def test_what_is_no_decision_does_not_matter(ratio: Ratio) -> None:
    """NaN in padding, protected layers and followers: same loss, finite gradients, zero where masked."""
    decides_LBT = some_mask()
    values = ValueInputs(draw(ROWS, COLUMNS), draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1))
    options = PPOLossSettings(ratio=ratio)
    extra = {"reference_LBT": draw(*SHAPE).sigmoid(), "skip_gain_LBT": draw(*SHAPE, seed=1)}
    _, clean = random_inputs(decides_LBT=decides_LBT, values=values, **extra)
    prob_LBT = clean.prob_LBT.detach().masked_fill(~decides_LBT, math.nan).requires_grad_()
    spoilt_BT = ~decides_LBT.any(0)
    spoilt = replace(
        clean,
        prob_LBT=prob_LBT,
        skip_LBT=clean.skip_LBT ^ ~decides_LBT,
        old_logp_LBT=clean.old_logp_LBT.masked_fill(~decides_LBT, math.nan),
        advantage_BT=clean.advantage_BT.masked_fill(spoilt_BT, math.nan),
        values=replace(values, target_BT=values.target_BT.masked_fill(spoilt_BT, math.nan)),
        **{k: v.masked_fill(~decides_LBT, math.nan) for k, v in extra.items()},
    )
    found, wanted = (ppo_loss(inputs, options, POLICY) for inputs in (spoilt, clean))
    assert torch.equal(found.loss, wanted.loss)
    assert all(torch.equal(found.metrics[name], wanted.metrics[name]) for name in wanted.metrics)
    (gradient,) = torch.autograd.grad(found.loss, prob_LBT)
    assert gradient[decides_LBT].abs().min() > 0 and not gradient[~decides_LBT].any()


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("cuts", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_a_step_does_not_depend_on_how_it_is_cut(ratio: Ratio, cuts: list[int]) -> None:
    decides_LBT = some_mask()
    counts = StepCounts(0, 0, 0)
    for part in decides_LBT.split(cuts, dim=1):
        counts = counts + StepCounts.of(part, ratio)
    assert counts == StepCounts.of(decides_LBT, ratio)
    logit_LBT, whole = random_inputs(
        decides_LBT=decides_LBT,
        reference_LBT=draw(*SHAPE).sigmoid(),
        skip_gain_LBT=draw(*SHAPE, seed=1),
        values=ValueInputs(draw(ROWS, COLUMNS), draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1)),
    )
    options = PPOLossSettings(ratio=ratio, value_clip=0.1)
    at_once = ppo_loss(whole, options, POLICY)
    parts = [
        ppo_loss(rows_of(whole, rows, counts), options, POLICY)
        for rows in torch.arange(ROWS).split(cuts)
    ]
    for name, value in at_once.metrics.items():
        pieces = torch.stack([part.metrics[name] for part in parts])
        together = pieces.max() if name == "ppo/ratio_max" else pieces.sum()
        assert torch.allclose(together, value, atol=1e-6), name
    (gradient,) = torch.autograd.grad(
        torch.stack([part.loss for part in parts]).sum(), logit_LBT, retain_graph=True
    )
    (wanted,) = torch.autograd.grad(at_once.loss, logit_LBT)
    assert torch.allclose(gradient, wanted, atol=1e-6)


def rows_of(inputs: LossInputs, rows: Tensor, counts: StepCounts) -> LossInputs:
    values, reference, gain = inputs.values, inputs.reference_LBT, inputs.skip_gain_LBT
    assert values is not None and reference is not None and gain is not None
    return LossInputs(
        inputs.prob_LBT[:, rows],
        inputs.skip_LBT[:, rows],
        inputs.old_logp_LBT[:, rows],
        inputs.decides_LBT[:, rows],
        inputs.advantage_BT[rows],
        reference[:, rows],
        gain[:, rows],
        ValueInputs(values.value_BT[rows], values.old_value_BT[rows], values.target_BT[rows]),
        counts,
    )


def test_a_call_without_decisions_is_worth_nothing() -> None:
    logit_LBT, inputs = random_inputs(decides_LBT=torch.zeros(SHAPE, dtype=torch.bool))
    found = ppo_loss(inputs, PPOLossSettings(), POLICY)
    found.loss.backward()
    assert found.loss == 0.0 and logit_LBT.grad is not None and not logit_LBT.grad.any()


@pytest.mark.parametrize(
    ("block", "forced", "wanted"),
    [
        (1, {2}, (0, 1, 3, 4, 5, 6, 7)),
        (3, {0, 2, 7}, (1, 3, 6)),
        (4, {0, 1, 2, 3}, (4,)),
        (8, set(range(8)), ()),
    ],
)
def test_one_layer_decides_for_each_block(
    block: int, forced: set[int], wanted: tuple[int, ...]
) -> None:
    assert deciding_layers(8, block, forced) == wanted
    columns_BT = torch.tensor([[False, True, True], [True, False, False]])
    mask_LBT = decision_mask(8, wanted, columns_BT)
    assert mask_LBT.any(2).any(1).nonzero().flatten().tolist() == list(wanted)
    assert int(mask_LBT.sum()) == 3 * len(wanted)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (GatePolicy, {"low": 0.0}, "strictly between 0 and 1"),
        (GatePolicy, {"low": 0.6, "high": 0.4}, "the lower first"),
        (GatePolicy, {"temperature": 0.0}, "temperature is 0.0"),
        (PPOLossSettings, {"clip": 1.0}, "clip is 1.0"),
        (PPOLossSettings, {"kl_coef": -1.0}, "kl_coef is -1.0"),
        (PPOLossSettings, {"value_clip": 0.0}, "value_clip is 0.0"),
    ],
)
def test_settings_that_cannot_work(make: Any, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**options)
