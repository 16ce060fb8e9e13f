"""Calibration, baselines and closed-form fits against loops, numpy and layers made for the purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.baselines import random_skip, removal_harm, static_skip
from fbs_rl.model.calibration import calibrate_tau, measure_quality, measure_skip
from fbs_rl.model.gate_fit import centre_gates, fit_adapters, fit_gates, ridge
from fbs_rl.model.layer import unit_norm
from tests.tiny import HIDDEN, LAYERS, SMALL, VOCAB, enliven, fresh, lively

START = 6
SEQUENCES = torch.randint(0, VOCAB, (5, 24), generator=torch.Generator().manual_seed(4))
FREE = [0, 1, 3, 4, 5, 6, 7]  # layer 2 is the boundary layer


# --- measure_quality -----------------------------------------------------------------------------------


def naive_quality(model: Any, gates: dict[str, Any]) -> tuple[float, float, int]:
    """One sequence and one token at a time."""
    nll, skipped, places = [], 0, 0
    for row, ids in enumerate(SEQUENCES):
        call = dict(gates)
        if "skip" in call:
            call["skip"] = call["skip"][:, row : row + 1]
        with torch.no_grad():
            out = model(ids[None], decode_start=START, **call)
        for t in range(START, len(ids) - 1):
            nll.append(-out.logits[0, t].double().log_softmax(-1)[ids[t + 1]].item())
        for t in range(START, len(ids)):
            skipped, places = skipped + int(out.skip[:, 0, t].sum()), places + LAYERS
    return float(np.mean(nll)), skipped / places, len(nll)


@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("mode", ["dense", "threshold", "replay"])
def test_quality_equals_a_loop(mode: str, batch: int) -> None:
    model, gates = lively(), {"gates": mode}
    if mode == "threshold":
        gates["tau"] = 0.5
    if mode == "replay":
        gates["skip"] = random_skip(model.config, SEQUENCES, START, 0.4)
    found = measure_quality(model, SEQUENCES, START, batch, **gates)
    nll, ratio, tokens = naive_quality(model, gates)
    assert found.nll == pytest.approx(nll, abs=1e-5) and found.tokens == tokens == 5 * 17
    assert found.skip_ratio == pytest.approx(ratio, abs=1e-12)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert (ratio == 0) is (mode == "dense") and ratio < 0.9


# --- calibrate_tau -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("kv", ["project", "noop"])
def test_the_calibrated_threshold_gives_the_ratio(kv: str, wanted: float) -> None:
    model = lively(kv_on_skip=kv)
    tau = calibrate_tau(model, SEQUENCES, START, wanted)
    found = measure_quality(model, SEQUENCES, START, gates="threshold", tau=tau)
    assert abs(found.skip_ratio - wanted) < 0.03


def test_more_steps_come_nearer() -> None:
    model = lively()
    gaps = []
    for steps in (1, 4, 10):
        tau = calibrate_tau(model, SEQUENCES, START, 0.3, steps=steps)
        quality = measure_quality(model, SEQUENCES, START, gates="threshold", tau=tau)
        gaps.append(abs(quality.skip_ratio - 0.3))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 7 / 8, 1.0, float("nan")])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(
        ValueError, match=r"7 of 8 layers may skip, so it must lie between 0 and 0\.88"
    ):
        calibrate_tau(lively(), SEQUENCES, START, ratio)


def test_a_model_without_gates_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="0 of 8 layers may skip"):
        calibrate_tau(fresh(gate=False), SEQUENCES, START, 0.3)


# --- baselines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_random_skips_are_as_many_as_asked_and_of_free_layers(ratio: float) -> None:
    config = fresh(never_skip=[5]).config
    many = torch.zeros(40, 200, dtype=torch.long)
    if ratio == 0.8:
        with pytest.raises(ValueError, match="more than the layers that may skip"):
            random_skip(config, many, START, ratio)
        return
    skip = random_skip(config, many, START, ratio, seed=3)
    assert skip.shape == (LAYERS, 40, 200) and skip.dtype is torch.bool
    assert not skip[[2, 5]].any() and not skip[:, :, :START].any()
    places = 40 * (200 - START)
    rates = skip[:, :, START:].float().mean((1, 2))
    wanted = ratio * 8 / 6
    spread = (wanted * (1 - wanted) / places) ** 0.5
    assert ((rates[[0, 1, 3, 4, 6, 7]] - wanted).abs() < 4.5 * spread).all()
    assert skip[:, :, START:].float().mean().item() == pytest.approx(ratio, abs=2 * spread)


def test_random_skips_follow_the_seed_and_fit_a_replay() -> None:
    model = lively()
    first, same, other = (
        random_skip(model.config, SEQUENCES, START, 0.4, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])  # rows differ
    out = model(SEQUENCES, gates="replay", skip=first, decode_start=START)
    assert torch.equal(out.skip, first)


def test_random_skips_of_a_model_without_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="may skip"):
        random_skip(fresh(gate=False).config, SEQUENCES, START, 0.3)


def test_static_skips_drop_the_named_layers_everywhere() -> None:
    skip = static_skip(lively().config, SEQUENCES, START, [1, -1])
    wanted = torch.zeros(LAYERS, *SEQUENCES.shape, dtype=torch.bool)
    wanted[1, :, START:] = wanted[7, :, START:] = True
    assert torch.equal(skip, wanted)
    assert not static_skip(lively().config, SEQUENCES, START, []).any()


# --- removal_harm --------------------------------------------------------------------------------------


def test_a_layer_that_does_nothing_can_be_dropped_for_free() -> None:
    model = fresh()
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    told: list[int] = []
    harm = removal_harm(model, SEQUENCES, START, told.append)
    assert harm.shape == (LAYERS, 5, 18) and told == list(range(LAYERS))
    assert torch.equal(harm[4], torch.zeros(5, 18))
    assert harm[2].isnan().all() and not harm[FREE].isnan().any()
    others = harm[[0, 1, 3, 5, 6, 7]]
    assert others.min() > -1e-5 and (others.mean((1, 2)) > 0.01).all()


def test_harm_is_the_divergence_from_the_dense_pass() -> None:
    model, layer = lively(), 5
    harm = removal_harm(model, SEQUENCES, START)[layer]
    skip = static_skip(model.config, SEQUENCES, START, [layer])
    for row, ids in enumerate(SEQUENCES):
        call = {"gates": "replay", "skip": skip[:, row : row + 1], "decode_start": START}
        with torch.no_grad():
            dense = model(ids[None], gates="dense").logits[0].double().softmax(-1).numpy()
            without = model(ids[None], **call).logits[0].double().softmax(-1).numpy()
        for t in range(START, len(ids)):
            kl = sum(p * math.log(p / q) for p, q in zip(dense[t], without[t], strict=True))
            assert harm[row, t - START].item() == pytest.approx(kl, abs=1e-5)


# --- ridge -----------------------------------------------------------------------------------------------


def numpy_ridge(inputs: Tensor, targets: Tensor) -> np.ndarray:
    """Least squares with the penalty as extra rows: a tenth of the inputs' mean square sum."""
    x, y = inputs.double().numpy(), targets.double().numpy()
    penalty = 0.1 * (x**2).sum(0).mean()
    rows = np.vstack([x, math.sqrt(penalty) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]


@pytest.mark.parametrize(("rows", "scale"), [(40, 1.0), (40, 1e3), (5, 1.0)])
def test_ridge_equals_augmented_least_squares(rows: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = scale * torch.randn(rows, 7, generator=draw) * torch.logspace(-1, 1, 7)
    targets = torch.randn(rows, 3, generator=draw)
    found = ridge(inputs, targets)
    assert found.dtype is torch.float32 and found.shape == (7, 3)
    np.testing.assert_allclose(found.numpy(), numpy_ridge(inputs, targets), rtol=1e-4, atol=1e-7)


def test_ridge_of_nothing_is_zero() -> None:
    assert torch.equal(ridge(torch.zeros(4, 3), torch.ones(4, 2)), torch.zeros(3, 2))


# --- fit_adapters ----------------------------------------------------------------------------------------


RANK, EXACT = 8, 3


def model_with_an_adapter_inside() -> Any:
    """Layer EXACT adds B·SiLU(A·x̂) and nothing else, with A of its own adapter: attention adds nothing, the
    MLP's gate projection is A, its up projection the constant 1, its down projection B.
    """
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=RANK,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        mlp_bias=True,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    made: Any = FBSForCausalLM.from_backbone(
        LlamaForCausalLM(config), FBSConfig(**{**SMALL, "adapter_rank": RANK})
    )
    layer = made.model.layers[EXACT]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.gate_proj.weight.copy_(layer.skip_path.down.weight)
        layer.mlp.up_proj.weight.zero_()
        layer.mlp.up_proj.bias.fill_(1.0)
        for name in ("gate_proj", "down_proj"):
            layer.mlp.get_submodule(name).bias.zero_()
    return made


def test_an_adapter_recovers_a_layer_that_is_one() -> None:
    model = model_with_an_adapter_inside()
    draw = torch.Generator().manual_seed(2)
    sequences = torch.randint(0, VOCAB, (16, 40), generator=draw)
    before = removal_harm(model, sequences, START).mean((1, 2))
    explained = fit_adapters(model, sequences, START)
    after = removal_harm(model, sequences, START).mean((1, 2))
    place = FREE.index(EXACT)
    assert len(explained) == len(FREE) and explained[place] > 0.97
    assert max(explained[:place] + explained[place + 1 :]) < 0.9
    assert after[EXACT] < 0.05 * before[EXACT]
    layer = model.model.layers[EXACT]
    true, found = layer.mlp.down_proj.weight, layer.skip_path.up.weight
    assert F.cosine_similarity(true.flatten(), found.flatten(), dim=0) > 0.98


def test_explained_shares_are_those_of_unseen_sequences() -> None:
    model = fresh()
    with torch.no_grad():
        states = model(SEQUENCES, gates="dense", output_hidden_states=True)
    inputs, outputs = states.taps.states, [*states.taps.states[1:], states.taps.final_state_BTd]
    explained = fit_adapters(model, SEQUENCES, START)
    for place, index in enumerate(FREE):
        state = inputs[index][:, START:].flatten(0, 1)
        update = (outputs[index][:, START:].flatten(0, 1) - state).double().numpy()
        down = model.model.layers[index].skip_path.down.weight.detach()
        inner = F.silu(unit_norm(state, 1e-6) @ down.T)
        fitted = len(inner) * 3 // 4
        weight = numpy_ridge(inner[:fitted], torch.from_numpy(update[:fitted]))
        rest = update[fitted:] - inner[fitted:].double().numpy() @ weight
        share = 1 - (rest**2).sum() / (update[fitted:] ** 2).sum()
        assert explained[place] == pytest.approx(share, abs=1e-4)
        found = model.model.layers[index].skip_path.up.weight.detach().numpy()
        np.testing.assert_allclose(found, weight.T, rtol=1e-3, atol=1e-5)


def test_models_without_adapters_have_nothing_to_fit() -> None:
    assert fit_adapters(fresh(skip_path="identity"), SEQUENCES, START) == []


# --- fit_gates -----------------------------------------------------------------------------------------


def mean_logits(model: Any) -> Tensor:
    with torch.no_grad():
        prob = model(SEQUENCES, gates="dense").gate_prob[:, :, START:]
    logit = torch.logit(prob.double())
    assert logit[FREE].abs().max() < model.config.gate_logit_clip - 0.1  # the clip is not reached
    return logit.mean((1, 2))


def test_gates_order_layers_by_harm() -> None:
    model = fresh(gate_logit_clip=8.0)
    harm = removal_harm(model, SEQUENCES, START)
    scores = fit_gates(model, SEQUENCES, START, harm)
    assert len(scores) == len(FREE) and model.config.gates_origin == "fitted"
    by_harm = sorted(FREE, key=lambda i: harm[i].mean().item())
    logits = mean_logits(model)
    assert sorted(FREE, key=lambda i: -logits[i].item()) == by_harm
    # The mean logit of a gate is minus its layer's log harm, shifted and scaled alike for all layers.
    level = torch.stack([harm[i].mean().log() for i in FREE]).double()
    slope = (logits[FREE][0] - logits[FREE][-1]) / (level[-1] - level[0])
    assert slope > 0
    torch.testing.assert_close(
        logits[FREE] - logits[FREE][0], slope * (level[0] - level), atol=2e-3, rtol=2e-3
    )


def test_gates_order_tokens_by_harm_where_they_can() -> None:
    """Harm whose logarithm is linear in what a gate weighs is found again."""
    model = fresh(gate_hidden=4, gate_logit_clip=8.0)
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for index in FREE:
            weight = model.model.layers[index].skip_gate.out.weight
            weight.copy_(3 * torch.randn(weight.shape, generator=draw))
        log_harm = torch.logit(model(SEQUENCES, gates="dense").gate_prob[:, :, START:].double())
    harm = log_harm.exp().float()
    harm[2] = float("nan")
    scores = fit_gates(model, SEQUENCES, START, harm)
    assert min(scores) > 0.8
    with torch.no_grad():
        found = torch.logit(model(SEQUENCES, gates="dense").gate_prob[:, :, START:].double())
    for index in FREE:
        pair = torch.stack((found[index].flatten(), log_harm[index].flatten()))
        assert torch.corrcoef(pair)[0, 1] < -0.85


def test_a_gate_of_a_block_answers_for_its_members() -> None:
    """The first layer of the second block could go for next to nothing, its fellows could not."""
    model = fresh(gate_block=4, gate_logit_clip=8.0)
    draw = torch.Generator().manual_seed(3)
    harm = (0.1 * torch.randn(LAYERS, *SEQUENCES[:, START:].shape, generator=draw)).exp()
    harm[2] = float("nan")
    harm[4] *= 0.05
    harm[5:] *= 20.0
    assert len(fit_gates(model, SEQUENCES, START, harm)) == 2
    with torch.no_grad():
        prob = model(SEQUENCES, gates="dense").gate_prob[:, :, START:]
    logits = torch.logit(prob.double()).mean((1, 2))
    assert logits[0] > logits[4] + 1.0


def test_equal_harm_everywhere_leaves_the_gates_finite() -> None:
    model = fresh()
    fit_gates(model, SEQUENCES, START, torch.full((LAYERS, 5, 24 - START), 0.1))
    assert all(p.isfinite().all() for p in model.parameters())


def test_centred_gates_skip_the_asked_share_at_a_half() -> None:
    model = enliven(fresh())
    before = [layer.skip_gate.out.bias.item() for layer in model.model.layers if layer.skip_gate]
    centre_gates(model, SEQUENCES, START, 0.3)
    assert measure_skip(model, SEQUENCES, START, gates="threshold", tau=0.5) == pytest.approx(
        0.3, abs=0.02
    )
    after = [layer.skip_gate.out.bias.item() for layer in model.model.layers if layer.skip_gate]
    shifts = {round(a - b, 5) for a, b in zip(after, before, strict=True)}
    assert len(shifts) == 1


def test_the_skip_ratio_alone_is_that_of_the_quality() -> None:
    gates = {"gates": "threshold", "tau": 0.5}
    quality = measure_quality(lively(), SEQUENCES, START, **gates)
    assert measure_skip(lively(), SEQUENCES, START, **gates) == quality.skip_ratio
