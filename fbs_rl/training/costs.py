"""What a run will take: FLOPs, hours, memory and bytes, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fbs_rl.model.configuration import FBSConfig

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from the vendor's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def backbone_parameters(config: FBSConfig) -> int:
    """Parameters of the backbone that a token is multiplied with: layers and output embedding, no biases."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads or 0
    width, head = config.hidden_size, config.head_dim or 0
    layer = width * head * (2 * heads + 2 * groups) + 3 * width * config.intermediate_size
    return config.layer_count * layer + width * config.vocab_size


def training_flops_per_token(config: FBSConfig, sequence_tokens: int) -> float:
    """FLOPs of the backbone, forward and backward, per token: 6 per weight, and causal attention.

    The convention of model-FLOPs utilisation: what recomputation, FBS modules and a teacher cost lowers the
    utilisation and is not credited.
    """
    attention = 2 * 2 * (sequence_tokens / 2) * config.num_attention_heads * (config.head_dim or 0)
    return 6 * backbone_parameters(config) + 3 * attention * config.layer_count


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank; activations are a rough upper figure."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    config: FBSConfig, parameters: int, trained: int, matrices: int, ranks: int, zero_stage: int,
    precision: str, micro_tokens: int, checkpointing: bool,
) -> MemoryEstimate:  # fmt: skip
    """What a rank holds under a ZeRO stage, from the usual accounting (weights, gradients, master, moments).

    matrices: those of the parameters that stage 3 spreads over the ranks.
    """
    element = 2 if precision == "bf16" else 4
    gradients = ranks if zero_stage >= 2 else 1
    states = ranks if zero_stage >= 1 else 1
    spread = matrices if zero_stage == 3 else 0
    master = 4 * trained if precision == "bf16" or zero_stage else 0
    per_layer = 2 if checkpointing else 34 + 4 * config.intermediate_size / config.hidden_size
    activations = (
        micro_tokens * config.hidden_size * element * (config.layer_count * per_layer + 40)
    )
    logits = 3 * 2**29
    return MemoryEstimate(
        weights=element * (parameters - spread + spread / ranks),
        gradients=element * trained / gradients,
        optimizer=(8 * trained + master) / states,
        activations=activations + logits,
    )


def checkpoint_bytes(parameters: int, trained: int, precision: str) -> float:
    """Bytes of one training checkpoint: weights, master weights and two moments."""
    return parameters * (2 if precision == "bf16" else 4) + 12 * trained
