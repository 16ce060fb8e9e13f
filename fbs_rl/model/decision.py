"""Decisions: from a gate's logit to who skips a layer, the same for a sequence and for a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fbs_rl.model.compiled import compiling
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.skip_gate import block_uniform
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
    noise_LBT: Tensor | None = field(init=False, default=None)
    bar_BT: Tensor | None = field(init=False, default=None)  # τ; out of reach where no gate may act
    sharpness: tuple[Tensor, float | Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.request.mode is GateMode.THRESHOLD:
            self.bar_BT = torch.where(self.gated_BT, self.request.tau_B.unsqueeze(1), torch.inf)
            temperature: float | Tensor = self.request.temperature
            if compiling():  # a number would be compiled in, and it changes from step to step
                temperature = torch.full((), temperature, device=self.gated_BT.device)
            self.sharpness = torch.logit(self.request.tau_B, eps=1e-6).unsqueeze(1), temperature

    @classmethod
    def of(
        cls, config: FBSConfig, request: GateRequest, position_BT: Tensor, valid_BT: Tensor | None
    ) -> Decider:
        gated_BT = position_BT >= request.decode_start_B.unsqueeze(1)
        if valid_BT is not None:
            gated_BT = gated_BT & valid_BT
        forced = config.forced_layers(request.never_skip)
        return cls(config, request, forced, position_BT, gated_BT)

    def noise(self) -> Tensor:
        """What SAMPLE compares p with [L, B, T]: 1 where no gate may act, as no probability is above it.

        Drawn when it is asked for: the compiled step draws the same by itself.
        """
        if self.noise_LBT is None:
            drawn_LBT = self.request.noise_LBT
            if drawn_LBT is None:
                assert self.request.seed_B is not None
                drawn_LBT = block_uniform(self.config, self.request.seed_B, self.position_BT)
            self.noise_LBT = torch.where(self.gated_BT, drawn_LBT, 1.0)
        return self.noise_LBT

    def verdict(self, layer: int) -> Verdict:
        """How `layer` decides."""
        request = self.request
        given_LBT = request.skip_LBT if request.mode is GateMode.REPLAY else None
        return Verdict(
            gated_BT=self.gated_BT,
            asks=len(self.config.block_asked_at(layer)) > 0,
            ahead=self.config.gate_ahead > 0,
            dense=request.mode is GateMode.DENSE,
            protected=layer in self.forced,
            given_BT=None if given_LBT is None else given_LBT[layer],
            bar_BT=self.bar_BT,
            noise_BT=self.noise()[layer] if request.mode is GateMode.SAMPLE else None,
            sharpness=self.sharpness,
        )


@dataclass(slots=True)
class Verdict:
    """How one layer decides; exactly one of given, bar and noise is there unless nothing can skip.

    asks: a new decision is taken before this layer, ahead: for a block behind it. dense: nothing skips in this call.
    protected: this layer never does, whatever its block decides. given_BT: actions of somebody
    else. bar_BT: skip where p reaches it. noise_BT: skip where p is above it. sharpness: (logit τ [B, 1], T) of
    the surrogate of threshold gates.
    """

    gated_BT: Tensor
    asks: bool
    ahead: bool
    dense: bool
    protected: bool
    given_BT: Tensor | None = None
    bar_BT: Tensor | None = None
    noise_BT: Tensor | None = None
    sharpness: tuple[Tensor, float | Tensor] | None = None

    def skip(self, prob_BT: Tensor | None) -> Tensor | None:
        """z [B, T] bool; None when nobody can skip. prob_BT: of the layer's block."""
        if self.dense or self.protected:
            return None
        if self.given_BT is not None:
            return self.given_BT
        if prob_BT is None:
            return None
        if self.bar_BT is not None:
            return prob_BT >= self.bar_BT
        assert self.noise_BT is not None
        return self.noise_BT < prob_BT

    def surrogate(self, logit_BT: Tensor | None, prob_BT: Tensor | None, skip_BT: Tensor) -> Tensor:
        """The p whose gradient the straight-through estimator uses (SPEC 4.2, 4.7).

        Replayed actions are somebody else's: they pass no gradient on.
        """
        if logit_BT is None or prob_BT is None or self.given_BT is not None:
            return skip_BT.float()
        if self.sharpness is not None:
            centre_B1, temperature = self.sharpness
            prob_BT = torch.sigmoid((logit_BT - centre_B1) / temperature)
        return torch.where(self.gated_BT, prob_BT, 0.0)


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
