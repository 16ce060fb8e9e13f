"""Gates and skip adapters fitted in closed form: minutes on a CPU, no gradient, a starting point for training.

A gate's last layer becomes the ridge regression, from what it weighs, of the log harm of dropping its
layer at that token. An adapter's second matrix becomes the ridge regression of what the layer adds to the
state. Inner layers keep their random values. One layer's harm at a time says nothing about skipping many
together: Stage 1 training does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.baselines import removal_harm
from fbs_rl.model.calibration import calibrate_tau
from fbs_rl.model.layer import unit_norm
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_path import SkipAdapter


@dataclass(frozen=True, slots=True)
class ClosedFormFit:
    """explained: share of its layer's update that each adapter explains. scores: R² of the log harm per gate.

    drop_order: layers that may skip, the least harmful to drop first.
    """

    explained: list[float]
    scores: list[float]
    drop_order: list[int]


_RIDGE = 0.1
_HARM_FLOOR_NATS = 1e-6


def fit_in_closed_form(
    model: FBSForCausalLM,
    sequences_NT: Tensor,
    decode_start: int,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> ClosedFormFit:
    """Fit every adapter, measure the harm of dropping each layer, and fit every gate to it."""
    explained = fit_adapters(model, sequences_NT, decode_start)
    harm_LNT = removal_harm(model, sequences_NT, decode_start, on_layer=on_layer)
    scores = fit_gates(model, sequences_NT, decode_start, harm_LNT)
    mean_harm_L = harm_LNT.mean((1, 2)).nan_to_num(float("inf"))
    order = [int(layer) for layer in mean_harm_L.argsort() if mean_harm_L[layer] < float("inf")]
    return ClosedFormFit(explained, scores, order)


@torch.no_grad()
def centre_gates(
    model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int, ratio: float, steps: int = 8
) -> None:
    """Shift all gates alike so that `ratio` of the layers has p >= 1/2.

    A closed-form fit orders skips and says nothing about how many there should be; training samples from p.
    """
    tau = calibrate_tau(model, sequences_NT, decode_start, ratio, steps)
    for layer in model.model.fbs_layers():
        if layer.skip_gate is not None:
            layer.skip_gate.out.bias.sub_(math.log(tau / (1 - tau)))


@torch.inference_mode()
def fit_adapters(model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int) -> list[float]:
    """Fit every skip adapter; returns, per adapter, the share of the layer's update that it now explains.

    The share is measured on the quarter of the sequences that the fit does not see.
    """
    out = model(sequences_NT.to(model.device), gates="dense", output_hidden_states=True)
    states = [*out.taps.states, out.taps.final_state_BTd]
    explained = []
    for layer in model.model.fbs_layers():
        adapter = layer.skip_path
        if not isinstance(adapter, SkipAdapter):
            continue
        state = states[layer.index][:, decode_start:]
        update = (states[layer.index + 1][:, decode_start:] - state).flatten(0, 1).float()
        normed = unit_norm(state, model.config.rms_norm_eps)
        inner = F.silu(adapter.down(normed)).flatten(0, 1).float()
        fitted = 3 * len(inner) // 4
        weight = ridge(inner[:fitted], update[:fitted])
        rest = update[fitted:]
        explained.append(
            float(1 - (rest - inner[fitted:] @ weight).square().sum() / rest.square().sum())
        )
        adapter.up.weight.copy_(weight.T)
    return explained


@torch.inference_mode()
def fit_gates(
    model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int, harm_LNT: Tensor
) -> list[float]:
    """Fit every gate to `harm_LNT` (of removal_harm); returns R² of the log harm per gate, on unseen tokens.

    The logit is minus the predicted log harm, shifted so that the middle of all gates is 0 and scaled
    to stay within the clip: only the order matters, since tau is calibrated afterwards.
    """
    activations = _gate_activations(model, sequences_NT, decode_start)
    log_harm_LNT = harm_LNT.clamp_min(_HARM_FLOOR_NATS).log()
    leaders = list(activations)
    free = [
        layer
        for layer in range(model.config.layer_count)
        if layer not in model.config.protected_layers
    ]
    spread = log_harm_LNT[free].flatten()
    centre = spread.median()
    scale = (
        0.6 * model.config.gate_logit_clip / (spread - centre).abs().quantile(0.95).clamp_min(1e-3)
    )
    scores = []
    for leader in leaders:
        members = [m for m in free if m in model.config.block_asked_at(leader)]
        target = log_harm_LNT[members].mean(0).flatten()
        # The mean harm, not the mean log: a layer that is vital for one token in ten must rank as vital.
        level = harm_LNT[members].mean().clamp_min(_HARM_FLOOR_NATS).log()
        inner = activations[leader]
        mean = inner.mean(0)
        fitted = 3 * len(inner) // 4
        weight = ridge(inner[:fitted] - mean, (target - target.mean())[:fitted, None]).squeeze(1)
        rest = (target - target.mean())[fitted:]
        scores.append(
            float(1 - (rest - (inner[fitted:] - mean) @ weight).square().mean() / rest.var())
        )
        gate = model.model.get_submodule(f"layers.{leader}.skip_gate")
        gate.out.weight.copy_(-scale * weight[None])  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        gate.out.bias.copy_(-scale * (level - centre - mean @ weight)[None])  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    model.config.gates_origin = "fitted"
    return scores


def ridge(inputs_NX: Tensor, targets_NY: Tensor) -> Tensor:
    """W [X, Y] minimising ‖inputs·W − targets‖² + λ‖W‖², λ relative to the inputs' mean square."""
    inputs, targets = inputs_NX.double(), targets_NY.double()
    gram = inputs.T @ inputs
    penalty = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device),
        inputs.T @ targets,
    )
    return weight.to(targets_NY.dtype)


def _gate_activations(
    model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int
) -> dict[int, Tensor]:
    """Per gate leader, what its last layer weighs in a dense pass: [N·(T − decode_start), gate_hidden] on the CPU."""
    captured: dict[int, Tensor] = {}
    handles = []
    for layer in model.model.fbs_layers():
        if layer.skip_gate is not None:

            def keep(gate: Any, inputs: Any, _: Any, index: int = layer.index) -> None:
                captured[index] = gate.activations(*inputs)[:, decode_start:].flatten(0, 1).cpu()

            handles.append(layer.skip_gate.register_forward_hook(keep))
    model(sequences_NT.to(model.device), gates="dense")
    for handle in handles:
        handle.remove()
    return captured
