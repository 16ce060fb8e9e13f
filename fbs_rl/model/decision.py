"""Decisions: from a gate's logit to who skips a layer, the same for a sequence and for a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.types import GateMode, GateRequest


@dataclass(slots=True)
class Decider:
    """Applies one GateRequest to one call.

    forced: layers that always run. position_BT: of the call's tokens. gated_BT: where gates may act
    (valid tokens at or after their row's decode start).
    """

    config: FBSConfig
    request: GateRequest
    forced: frozenset[int]
    position_BT: Tensor
    gated_BT: Tensor
    noise_LBT: Tensor | None = None  # 1 where no gate may act: no probability is above it
    bar_BT: Tensor | None = field(init=False, default=None)  # τ; out of reach where no gate may act

    def __post_init__(self) -> None:
        if self.request.mode is GateMode.THRESHOLD:
            self.bar_BT = torch.where(self.gated_BT, self.request.tau_B.unsqueeze(1), torch.inf)

    @classmethod
    def of(
        cls, config: FBSConfig, request: GateRequest, position_BT: Tensor, valid_BT: Tensor | None
    ) -> Decider:
        gated_BT = position_BT >= request.decode_start_B.unsqueeze(1)
        if valid_BT is not None:
            gated_BT = gated_BT & valid_BT
        noise_LBT = None
        if request.mode is GateMode.SAMPLE:
            assert request.seed_B is not None
            layer_L11 = torch.arange(config.layer_count, device=position_BT.device).view(-1, 1, 1)
            # One decision a block: its members draw the leader's noise.
            leader_L11 = layer_L11 - layer_L11 % config.gate_block
            noise_LBT = gate_uniform(request.seed_B, position_BT, leader_L11)
            noise_LBT = torch.where(gated_BT, noise_LBT, 1.0)
        forced = config.forced_layers(request.never_skip)
        return cls(config, request, forced, position_BT, gated_BT, noise_LBT)

    @property
    def learns(self) -> bool:
        """Whether decisions pass gradients on to the gate (replayed ones are somebody else's)."""
        return self.request.mode in (GateMode.THRESHOLD, GateMode.SAMPLE)

    def leads(self, layer: int) -> bool:
        """Whether a new decision is taken before this layer."""
        return layer % self.config.gate_block == 0

    def skip(self, layer: int, prob_BT: Tensor | None) -> Tensor | None:
        """z [B, T] bool for `layer`; None when nobody can skip it. prob_BT: of the layer's block."""
        mode = self.request.mode
        if mode is GateMode.DENSE or layer in self.forced:
            return None
        if mode is GateMode.REPLAY:
            assert self.request.skip_LBT is not None
            return self.request.skip_LBT[layer]
        if prob_BT is None:
            return None
        if mode is GateMode.THRESHOLD:
            assert self.bar_BT is not None
            return prob_BT >= self.bar_BT
        assert self.noise_LBT is not None
        return self.noise_LBT[layer] < prob_BT

    def surrogate(self, logit_BT: Tensor, prob_BT: Tensor) -> Tensor:
        """The p whose gradient the straight-through estimator uses (SPEC 4.2, 4.7)."""
        if self.request.mode is not GateMode.THRESHOLD:
            return prob_BT
        logit_tau_B = torch.logit(self.request.tau_B, eps=1e-6)
        return torch.sigmoid((logit_BT - logit_tau_B.unsqueeze(1)) / self.request.temperature)


def check_replay(config: FBSConfig, request: GateRequest, gated_BT: Tensor) -> None:
    """Raise ValueError if replayed actions do not fit the call: shape, protected layers, prompt tokens."""
    skip = request.skip_LBT
    expected = (config.layer_count, *gated_BT.shape)
    if skip is None or tuple(skip.shape) != expected:
        got = None if skip is None else tuple(skip.shape)
        raise ValueError(
            f'gates="replay" needs skip of shape [layers, batch, tokens] = {expected}, got {got}'
        )
    forced = sorted(config.forced_layers(request.never_skip))
    if forced and bool(skip[forced].any()):
        raise ValueError(
            f"skip names layers that never skip ({forced}); clear them or change never_skip"
        )
    if bool((skip & ~gated_BT).any()):
        raise ValueError(
            "skip names tokens before decode_start or padding; prompt tokens never skip"
        )
