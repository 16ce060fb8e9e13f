"""SG, the Skip-Gate: whether a token skips a layer, and the noise that sampled decisions use (SPEC 4)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import GateInputs

_WORD = 0xFFFFFFFF


class Foresight(Protocol):
    """What a gate reads of a preview (fbs_rl.model.preview.Glance): ṽ and H₁."""

    @property
    def pooled_BTE(self) -> Tensor: ...
    @property
    def entropy_BT(self) -> Tensor: ...


class Motion:
    """How the last executed layer moved each token's state: δ = ‖out − in‖/‖in‖ and cos(in, out).

    Observations for the gate, without gradient. Before any layer ran: δ = 0, cos = 1.
    """

    @staticmethod
    def still(batch: int, length: int, device: torch.device) -> Tensor:
        # Counted on the device: a copy to it would wait for it.
        return torch.arange(2, dtype=torch.float32, device=device).expand(batch, length, 2)

    @staticmethod
    def between(before_BTd: Tensor, after_BTd: Tensor) -> Tensor:
        """[B, T, 2] float32: (δ, cos)."""
        before, after = before_BTd.detach().float(), after_BTd.detach().float()
        moved = torch.linalg.vector_norm(after - before, dim=-1, keepdim=True)
        along = (before * after).sum(-1, keepdim=True) / _length(after)
        return torch.cat((moved, along), dim=-1) / _length(before)


def _length(state_BTd: Tensor) -> Tensor:
    return torch.linalg.vector_norm(state_BTd, dim=-1, keepdim=True).clamp_min(1e-10)


class SkipGate(nn.Module):
    """p = σ(clip(w·SiLU(W_3 g) + b)), the probability that the token skips (z = 1 means skip).

    g = [RMSNorm(W_1 x̂); δ; cos] (residual part) and [W_2 ṽ; H₁] (preview part); SPEC 4.1.
    """

    def __init__(self, config: FBSConfig) -> None:
        super().__init__()
        inputs = GateInputs(config.gate_inputs)
        self.reads_residual = inputs is not GateInputs.PREVIEW
        self.reads_preview = inputs is not GateInputs.RESIDUAL
        self.clip, self.bias_init = config.gate_logit_clip, config.gate_bias_init
        width = 0
        if self.reads_residual:
            self.reduce = nn.Linear(
                config.hidden_size, config.gate_residual_width, bias=False
            )  # W_1
            self.reduce_norm = nn.RMSNorm(config.gate_residual_width, eps=config.rms_norm_eps)
            width += config.gate_residual_width + 2
        if self.reads_preview:
            self.preview = nn.Linear(
                config.pooled_width, config.gate_preview_width, bias=False
            )  # W_2
            width += config.gate_preview_width + 1
        self.hidden = nn.Linear(width, config.gate_hidden)  # W_3
        self.out = nn.Linear(config.gate_hidden, 1)  # w, b

    def reset_parameters(self) -> None:
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.reads_residual:
            nn.init.ones_(self.reduce_norm.weight)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.out.weight, std=0.1 * self.out.in_features**-0.5)
        nn.init.constant_(self.out.bias, self.bias_init)

    def forward(self, normed_BTd: Tensor, motion_BT2: Tensor, glance: Foresight | None) -> Tensor:
        """Gate logits [B, T], float32, within ±gate_logit_clip."""
        hidden_BTG = self.activations(normed_BTd, motion_BT2, glance)
        logit = F.linear(hidden_BTG, self.out.weight.float(), self.out.bias.float()).squeeze(-1)
        return logit.clamp(-self.clip, self.clip)

    def activations(
        self, normed_BTd: Tensor, motion_BT2: Tensor, glance: Foresight | None
    ) -> Tensor:
        """SiLU(W_3 g) [B, T, gate_hidden], float32: what the last layer weighs."""
        parts = []
        if self.reads_residual:
            parts += [self.reduce_norm(self.reduce(normed_BTd)).float(), motion_BT2]
        if self.reads_preview:
            assert glance is not None
            entropy_BT1 = glance.entropy_BT.detach().unsqueeze(-1)
            parts += [self.preview(glance.pooled_BTE).float(), entropy_BT1]
        # From here on in float32 whatever the model's type: decisions hang on it.
        features = torch.cat(parts, dim=-1)
        return F.silu(F.linear(features, self.hidden.weight.float(), self.hidden.bias.float()))


def gate_uniform(seed_B: Tensor, position_BT: Tensor, layer: int | Tensor) -> Tensor:
    """Uniform numbers [B, T] in [0, 1), a pure function of (seed, position, layer).

    layer: an index, or a tensor of them that broadcasts ([L, 1, 1] gives [L, B, T]).
    float32 multiples of 2^-24, so every engine and device gets the same bits. The mixing is a chain of
    the 32-bit finaliser of MurmurHash3 (A. Appleby, public domain), written in 64-bit integers.
    """
    seed_B1 = seed_B.to(torch.int64).unsqueeze(-1)
    word = _mix(seed_B1 & _WORD) ^ _mix(((seed_B1 >> 32) & _WORD) ^ 0x9E3779B9)
    word = _mix(word ^ _mix((position_BT.to(torch.int64) & _WORD) ^ 0x85EBCA6B))
    word = _mix((word + (layer * 0xC2B2AE35 & _WORD)) & _WORD)
    return (word >> 8).to(torch.float32) * 2.0**-24


def block_uniform(config: FBSConfig, seed_B: Tensor, position_BT: Tensor) -> Tensor:
    """gate_uniform of every layer, [L, B, T]. One decision a block: its members draw the leader's noise."""
    layer_L11 = torch.arange(config.layer_count, device=position_BT.device).view(-1, 1, 1)
    return gate_uniform(seed_B, position_BT, layer_L11 - layer_L11 % config.gate_block)


def _mix(word: Tensor) -> Tensor:
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)
