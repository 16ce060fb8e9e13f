"""PAW, Skip-Gate and decisions: formulas against closed forms, hand computation and exact integers."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.model.decision import Decider, Verdict
from fbs_rl.model.kv_cache import LayerKV
from fbs_rl.model.layer import straight_through
from fbs_rl.model.skip_gate import Motion, gate_uniform
from fbs_rl.types import GateMode, GateRequest
from tests.reference_math import uniform
from tests.tiny import HIDDEN, LAYERS, VOCAB, enliven, fresh, left_padded, lively

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
HORIZONS = 15


def paw(**options: Any) -> Any:
    return fresh(paw_horizon=HORIZONS, **options).model.layers[0].paw


# --- window (SPEC 2.1, 2.2) -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.25])
def test_hard_window_is_the_soft_one_above_a_half(temperature: float) -> None:
    window = torch.linspace(0.013, 14.99, 701).unsqueeze(0)
    soft = paw().include(window, temperature)
    hard = paw(paw_inclusion="hard").include(window, temperature)
    assert torch.equal(hard[..., 1:], (soft > 0.5).float()[..., 1:])
    assert torch.equal(hard[..., 0], torch.ones_like(window))
    rounded = (window + 0.5).floor().clamp_min(1)
    assert torch.equal(hard.sum(-1), rounded)


@pytest.mark.parametrize(
    ("window", "wanted"),
    [(0.1, 1), (1.4, 1), (1.6, 2), (8.1, 8), (14.2, 14), (14.9, 15)],
)
def test_hard_window_by_hand(window: float, wanted: int) -> None:
    hard = paw(paw_inclusion="hard").include(torch.tensor([[window]]), 0.25)[0, 0]
    assert hard.tolist() == [1.0] * wanted + [0.0] * (HORIZONS - wanted)


@pytest.mark.parametrize(("temperature", "error"), [(1.0, 0.46), (0.5, 0.14), (0.25, 0.03)])
def test_inclusions_sum_to_the_window(temperature: float, error: float) -> None:
    """Within SPEC 2.2's errors, which hold half a token inside the range [0, K]."""
    window = torch.linspace(0.5, HORIZONS - 0.5, 1001).unsqueeze(0)
    gap = (paw().include(window, temperature).sum(-1) - window).abs()
    assert error - 0.02 < gap.max() < error + 0.005
    assert gap[0, 350:650].max() < 0.025  # far from both ends the sum is the window itself


def test_fixed_window_is_one_up_to_it() -> None:
    fixed = paw(paw_window="fixed", paw_fixed_window=4)
    window = fixed.predict_window(torch.randn(2, 3, HIDDEN))
    assert torch.equal(window, torch.full((2, 3), 4.0))
    assert fixed.include(window, 1.0)[0, 0].tolist() == [1.0] * 4 + [0.0] * 11


def test_a_fresh_window_expects_the_configured_share() -> None:
    with torch.no_grad():
        window = paw().predict_window(torch.randn(1, 2000, HIDDEN))
    assert abs(window.mean() / HORIZONS - 0.54) < 0.01


def test_hard_window_passes_the_soft_gradient() -> None:
    window = torch.tensor([[3.3]], requires_grad=True)
    weights = torch.randn(HORIZONS)
    (soft,) = torch.autograd.grad((paw().include(window, 0.5) * weights).sum(), window)
    layer = paw(paw_inclusion="hard")
    (hard,) = torch.autograd.grad((layer.include(window, 0.5) * weights).sum(), window)
    assert soft.abs() > 1e-3
    torch.testing.assert_close(hard, soft)


# --- preview vocabulary and its reduced embedding (SPEC 2.3) --------------------------------------------


@torch.no_grad()
def test_what_is_kept_of_weights_can_be_held_longer() -> None:
    """As a captured graph must, which reads it where it lies: the same until a weight changes, then something else."""
    model, ids = enliven(fresh()), torch.arange(6).unsqueeze(0)
    model(ids)
    held = model.model.derived()
    assert len(held) == 2 + len(model.config.preview_layers) and None not in held
    model(ids)
    assert all(one is other for one, other in zip(held, model.model.derived(), strict=True))
    for parameter in model.model.parameters():
        parameter.mul_(1.01)
    model(ids)
    assert not any(one is other for one, other in zip(held, model.model.derived(), strict=True))
    assert fresh(paw=False, gate_inputs="residual").model.derived() == ()


def test_vocabulary_keeps_the_most_frequent_tokens() -> None:
    head = fresh(paw_vocab_size=8).model.preview
    counts = torch.zeros(VOCAB)
    counts[[90, 40, 7, 60, 12]] = torch.tensor([5.0, 9.0, 2.0, 2.0, 30.0])
    head.set_vocabulary(counts)
    # Five tokens were seen; the other three places go to the smallest unseen ids.
    assert head.token_ids_N.tolist() == [0, 1, 2, 7, 12, 40, 60, 90]
    wanted = [math.log((counts[i].item() + 0.5) / (48 + 0.5 * VOCAB)) for i in head.token_ids_N]
    torch.testing.assert_close(head.log_prior_N, torch.tensor(wanted))


def test_the_prior_moves_the_shortlist() -> None:
    model = lively()
    head, weight = model.model.preview, model.model.embed_tokens.weight
    query = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reduced = weight[head.token_ids_N] @ head.embed_proj.weight.T
        score = query @ head.horizon_maps.mean(0).T @ reduced.T + head.log_prior_N
        found = head.shortlist(query, weight)
    wanted = score.topk(model.config.paw_shortlist).indices.sort().values
    assert torch.equal(found.index_BTM.sort().values, wanted)
    without_prior = (score - head.log_prior_N).topk(model.config.paw_shortlist).indices
    assert not torch.equal(without_prior.sort().values, wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["embed_proj", "embedding", "load_state_dict", "vocabulary", "optimizer"]
)
def test_reduced_embedding_is_never_stale(name: str) -> None:
    model = fresh()
    head, embedding = model.model.preview, model.model.embed_tokens.weight
    before = head.reduced_embedding(embedding)
    assert head.reduced_embedding(embedding) is before  # it is kept
    if name == "embed_proj":
        head.embed_proj.weight.mul_(1.5)
    elif name == "embedding":
        embedding[3].add_(1.0)
    elif name == "load_state_dict":
        state = {k: v * 1.5 if "embed_proj" in k else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)
    elif name == "vocabulary":
        head.set_vocabulary(torch.arange(VOCAB))
    else:
        head.embed_proj.weight.grad = torch.ones_like(head.embed_proj.weight)
        torch.optim.AdamW([head.embed_proj.weight], lr=0.1).step()
    after = head.reduced_embedding(embedding)
    torch.testing.assert_close(after, embedding[head.token_ids_N] @ head.embed_proj.weight.T)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["maps", "taps", "optimizer"])
def test_laid_out_weights_are_never_stale(name: str) -> None:
    """Horizon maps and convolution taps are kept in another order between passes without gradients."""
    model = enliven(fresh())
    ids = left_padded(3, [9])[0]
    with torch.inference_mode():
        before = model(ids).logits
    weights = {
        "maps": [model.model.preview.horizon_maps],
        "taps": [model.model.layers[0].paw.mix.weight],
    }
    if name == "optimizer":
        model(ids).logits.square().mean().backward()
        for weight in (*weights["maps"], *weights["taps"]):
            assert weight.grad is not None and weight.grad.abs().max() > 0
            weight.data -= 0.5 * weight.grad.sign()  # unseen by _version
    else:
        with torch.no_grad():
            weights[name][0].mul_(1.5)
    with torch.no_grad():
        after = model(ids).logits
        wanted = copy.deepcopy(model)(ids).logits
    assert torch.equal(after, wanted) and (after - before).abs().max() > 1e-4


def test_what_inference_kept_serves_training() -> None:
    model = enliven(fresh())
    ids = left_padded(3, [9])[0]
    model.requires_grad_(False)
    with torch.inference_mode():
        model(ids)
    gate = model.model.layers[4].skip_gate.requires_grad_(True)
    model.model.layers[0].paw.query_bias_R.requires_grad_(True)
    model(ids, gates="sample", gate_seed=1).logits.square().mean().backward()
    assert gate.out.weight.grad.abs().max() > 0


# --- motion, noise, decisions (SPEC 4) -------------------------------------------------------------------


def test_motion_by_hand() -> None:
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]])
    after = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [-1.0, 0.0]]])
    wanted = torch.tensor([[[0.0, 1.0], [math.sqrt(2), 0.0], [1.5, -1.0]]])
    torch.testing.assert_close(Motion.between(before, after), wanted, atol=1e-6, rtol=1e-6)
    assert Motion.still(2, 3, torch.device("cpu")).tolist() == [[[0.0, 1.0]] * 3] * 2


def test_motion_sees_small_moves_of_large_states() -> None:
    before = 1e4 * torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    after = before * (1 + 2.0**-10)
    torch.testing.assert_close(
        Motion.between(before, after)[..., 0], torch.full((1, 5), 2.0**-10), atol=0, rtol=1e-4
    )


def draws(seeds: int, positions: int, layer: int, first_seed: int = 0) -> Tensor:
    seed = torch.arange(first_seed, first_seed + seeds)
    return gate_uniform(seed, torch.arange(positions).expand(seeds, -1), layer)


@PROPERTY
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(0, 200))
def test_noise_equals_exact_integer_arithmetic(seed: int, position: int, layer: int) -> None:
    found = gate_uniform(torch.tensor([seed]), torch.tensor([[position]]), layer)
    assert found.item() == uniform(seed, position, layer)


def test_noise_known_answers() -> None:
    """Pinned: a change of these numbers changes every sampled run."""
    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40 + 3, 511, 35), (-1, 7, 2)]
    words = [
        int(gate_uniform(torch.tensor([s]), torch.tensor([[p]]), layer).item() * 2**24)
        for s, p, layer in cases
    ]
    assert words == [7455101, 4140675, 11285225, 5940187, 12602917, 14203736]


def test_noise_looks_uniform_and_independent() -> None:
    noise = draws(250, 400, layer=3).double()
    count = noise.numel()
    assert noise.min() >= 0 and noise.max() < 1
    assert torch.equal(noise * 2**24, (noise * 2**24).floor())
    assert abs(noise.mean() - 0.5) < 4 * math.sqrt(1 / 12 / count)
    assert abs(noise.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    cells = torch.bincount((noise * 256).long().flatten(), minlength=256).double()
    chi2 = ((cells - count / 256) ** 2 / (count / 256)).sum()
    assert 165 < chi2 < 355  # 255 degrees of freedom: mean 255, standard deviation 22.6


@pytest.mark.parametrize("axis", ["position", "seed", "layer"])
def test_neighbouring_noise_is_uncorrelated(axis: str) -> None:
    if axis == "layer":
        one, other = draws(250, 400, layer=3), draws(250, 400, layer=4)
    elif axis == "seed":
        one, other = draws(250, 400, layer=3), draws(250, 400, layer=3, first_seed=1)
    else:
        both = draws(250, 401, layer=3)
        one, other = both[:, :-1], both[:, 1:]
    correlation = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(one.numel())


def test_noise_does_not_depend_on_the_batch() -> None:
    seeds, positions = torch.tensor([5, -9, 2**35]), torch.arange(30).expand(3, -1)
    together = gate_uniform(seeds, positions, 6)
    for row in range(3):
        for t in (0, 11, 29):
            alone = gate_uniform(seeds[row : row + 1], positions[row : row + 1, t : t + 1], 6)
            assert alone.item() == together[row, t].item()


def chooser_of(tau: float, temperature: float, length: int) -> Verdict:
    request = GateRequest(
        GateMode.THRESHOLD, torch.tensor([tau]), torch.tensor([0]), temperature=temperature
    )
    positions = torch.arange(length).unsqueeze(0)
    return Decider.of(lively().config, request, positions, None).verdict(0)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.25])
def test_threshold_is_the_sharpened_probability_above_a_half(
    tau: float, temperature: float
) -> None:
    """z = 1[p >= τ] = 1[σ((a − logit τ)/T) > ½] (SPEC 4.7)."""
    logit = torch.linspace(-6, 6, 4001).unsqueeze(0)
    border = math.log(tau / (1 - tau)) if 0 < tau < 1 else math.inf
    logit = logit[(logit - border).abs() > 1e-4].unsqueeze(0)
    chooser = chooser_of(tau, temperature, logit.shape[1])
    skip = chooser.skip(torch.sigmoid(logit))
    assert skip is not None
    sharpened = chooser.surrogate(logit, torch.sigmoid(logit), skip)
    assert torch.equal(skip, sharpened > 0.5)
    if 0 < tau < 1:
        wanted = torch.sigmoid((logit - border) / temperature)
        torch.testing.assert_close(sharpened, wanted, atol=1e-5, rtol=1e-5)
        assert skip.any() and not skip.all()
    else:
        assert bool(skip.all()) == (tau == 0.0) and bool(skip.any()) == (tau == 0.0)


def test_a_probability_equal_to_the_threshold_skips() -> None:
    chooser = chooser_of(0.5, 1.0, 2)
    assert chooser.skip(torch.tensor([[0.5, 0.4999]])).tolist() == [[True, False]]


# --- straight-through gradients (SPEC 4.2) -----------------------------------------------------------------


def test_straight_through_equals_the_explicit_mixture() -> None:
    """Values and the gradients of z̃·h + (1 − z̃)·F with z̃ = z + p − sg(p)."""
    draw = torch.Generator().manual_seed(3)
    prob = torch.rand(2, 7, generator=draw).requires_grad_()
    skipped = torch.randn(2, 7, 5, generator=draw).requires_grad_()
    executed = torch.randn(2, 7, 5, generator=draw).requires_grad_()
    upstream, z = torch.randn(2, 7, 5, generator=draw), torch.rand(2, 7, generator=draw) < 0.5
    soft = (z.float() + prob - prob.detach()).unsqueeze(-1)
    explicit = soft * skipped + (1 - soft) * executed
    found = straight_through(prob, skipped, executed, z)
    assert torch.equal(found, torch.where(z.unsqueeze(-1), skipped, executed))
    inputs = (prob, skipped, executed)
    wanted = torch.autograd.grad((explicit * upstream).sum(), inputs)
    for one, other in zip(
        torch.autograd.grad((found * upstream).sum(), inputs), wanted, strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("path", ["identity", "adapter"])
@pytest.mark.parametrize("mode", ["sample", "threshold"])
def test_gate_gradient_of_the_model_equals_the_formula(mode: str, path: str) -> None:
    """One free layer: dL/db = Σ_t ⟨dL/dh_t, skipped_t − executed_t⟩ · ds_t/db, s the surrogate."""
    temperature = 0.5
    model = enliven(fresh(skip_path=path))
    call: dict[str, Any] = {"decode_start": 3, "never_skip": range(LAYERS - 1)}
    ids, mask = left_padded(4, [14, 10])
    observed = model(ids, mask, gates="dense", **call)
    gated = observed.taps.gated_BT
    tau = observed.gate_prob[-1][gated].median().item() + 1e-3
    gates = {"gates": mode, "tau": tau, "gate_seed": 8, "gate_temperature": temperature}
    found = model(ids, mask, **call, **gates)
    upstream = torch.randn(found.logits.shape, generator=torch.Generator().manual_seed(5))
    upstream = upstream * mask.unsqueeze(-1)
    bias = model.model.layers[-1].skip_gate.out.bias
    (grad,) = torch.autograd.grad((found.logits * upstream).sum(), bias)

    everything = torch.zeros(LAYERS, *ids.shape, dtype=torch.bool)
    everything[-1] = gated
    with torch.no_grad():
        skipped, executed = (
            model(ids, mask, gates="replay", skip=z, **call).taps.final_state_BTd
            for z in (everything, torch.zeros_like(everything))
        )
    state = found.taps.final_state_BTd.detach().requires_grad_()
    logits = model.lm_head(model.model.norm(state))
    (slope,) = torch.autograd.grad((logits * upstream).sum(), state)
    prob = found.gate_prob[-1].detach()
    assert prob[gated].min() > 0.01 and prob[gated].max() < 0.99  # the clip is not reached
    if mode == "threshold":
        prob = torch.sigmoid((torch.logit(prob) - math.log(tau / (1 - tau))) / temperature)
    scale = temperature if mode == "threshold" else 1.0
    per_token = (slope * (skipped - executed)).sum(-1) * prob * (1 - prob) / scale
    assert 0 < found.skip[-1].sum() < gated.sum()
    torch.testing.assert_close(grad, (per_token * gated).sum().unsqueeze(0), atol=1e-4, rtol=1e-4)


# --- cache buffers -------------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=6))
def test_layer_cache_returns_what_was_appended(parts: list[tuple[int, bool]]) -> None:
    draw = torch.Generator().manual_seed(9)
    cache = LayerKV(poison=True)
    keys, values, entries = [], [], []
    for length, partial in parts:
        key, value = torch.randn(2, 2, 2, length, 4, generator=draw)
        exists = torch.rand(2, length, generator=draw) < 0.5
        cache.append(key, value, exists if partial else None)
        keys.append(key)
        values.append(value)
        entries.append(exists if partial else torch.ones_like(exists))
    found = cache.view()
    assert torch.equal(found[0], torch.cat(keys, 2)) and torch.equal(found[1], torch.cat(values, 2))
    if any(partial for _, partial in parts):
        assert found[2] is not None and torch.equal(found[2], torch.cat(entries, 1))
    else:
        assert found[2] is None
