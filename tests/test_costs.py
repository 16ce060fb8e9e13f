"""What a run will take, against a real model's parameters, torch's FLOP counter and real optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.training.costs import (
    backbone_parameters,
    checkpoint_bytes,
    estimate_memory,
    peak_flops,
    training_flops_per_token,
)
from tests.tiny import VOCAB, backbone

SHAPES = [("llama", False), ("llama", True), ("qwen3", True)]
T = 24


def bound(model: PreTrainedModel) -> FBSConfig:
    return FBSConfig(paw=False, chunk=False, gate=False).bound_to(model.config)


@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_the_backbones_matrices_are_counted(family: str, tied: bool) -> None:
    """All that a token is multiplied with: norms and the input embedding, which is looked up, are left out."""
    model = backbone(family, tied)
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 2}
    if not tied:
        matrices.pop("model.embed_tokens.weight")
    assert backbone_parameters(bound(model)) == sum(matrices.values())


@pytest.mark.parametrize(("family", "tied"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_training_costs_three_forward_passes(family: str, tied: bool, rows: int) -> None:
    """The counter takes a causal pass for one in which all tokens see all T; the convention counts half of that."""
    model: Any = backbone(family, tied, "eager")
    ids = torch.randint(0, VOCAB, (rows, T), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        model(ids, use_cache=False)
    batched = {
        module: sum(flops for op, flops in by_op.items() if "bmm" in str(op))
        for module, by_op in counter.get_flop_counts().items()
    }
    attention = sum(flops for module, flops in batched.items() if module.endswith("self_attn"))
    rotary = batched["Global"] - attention
    assert attention > 0 and rotary < 0.01 * attention
    counted = counter.get_total_flops() - rotary - attention / 2
    assert training_flops_per_token(bound(model), T) * rows * T == pytest.approx(3 * counted)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    return weights + moments


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_weights_masters_and_moments(precision: str) -> None:
    """Half of the layers frozen: 40 of 80 parameters trained, with a float32 master and two moments each."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 10, bias=False) for _ in range(2))).to(dtype)
    model[0].requires_grad_(False)
    masters = [p.detach().float().requires_grad_() for p in model[1].parameters()]
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer = torch.optim.AdamW(masters)
    optimizer.step()
    bytes_of_masters = sum(4 * p.numel() for p in masters)
    assert checkpoint_bytes(80, 40, precision) == state_bytes(model, optimizer) + bytes_of_masters


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 2e9, 2e9, 12e9),
        (1, 2e9, 2e9, 3e9),
        (2, 2e9, 0.5e9, 3e9),
        (3, 0.8e9, 0.5e9, 3e9),
    ],
)
def test_zero_shards_what_it_says(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    """A billion parameters on four ranks in bf16: 2 + 2 + 12 bytes each (ZeRO, Rajbhandari et al., section 3).

    At stage 3 four fifths of them, the matrices of layers, are spread.
    """
    config = bound(backbone())
    found = estimate_memory(config, 10**9, 10**9, 8 * 10**8, 4, stage, "bf16", 16, False)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    parts = found.weights + found.gradients + found.optimizer + found.activations
    assert found.total == parts
    cheaper = estimate_memory(config, 10**9, 10**9, 8 * 10**8, 4, stage, "bf16", 16, True)
    assert cheaper.activations < found.activations


def test_frozen_parameters_cost_their_weights_alone() -> None:
    config = bound(backbone())
    found = estimate_memory(config, 1000, 0, 800, 1, 0, "fp32", 16, False)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 0, 0)
