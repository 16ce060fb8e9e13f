"""What an agent sees before a token is fed: facts that no layer has to run for.

Shape letters: L layers, P layers with a preview, S state features, d hidden size.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.gated_sequence import Reading
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.skip_gate import Motion

Observation = dict[str, Any]
_STATE_BOUND = 8.0  # features of a state are about normal with deviation 1
_NLL_BOUND = 30.0
_MOVED_BOUND = 10.0


class Phase(StrEnum):
    """What the tokens of a column are."""

    DECODE = "decode"  # the model's own, picked as it goes
    GOLD = "gold"  # the gold answer, given


PHASES = tuple(Phase)


def make_space(config: FBSConfig, state_features: int) -> spaces.Dict:
    """The observation space. "window" is left out for a model without previews.

    token: about to be fed. phase: index in PHASES. progress: share of the phase's columns that are done.
    token_nll, entropy: of the token and of the distribution it came from, in nats. state: S features of
    the final state of the token before. motion: δ and cos between the final states of the two tokens
    before. window: ŵ of the token before. last_skip: what the token before skipped (0 for the prompt).
    """

    def box(low: float | list[float], high: float | list[float], width: int) -> spaces.Box:
        lows, highs = (np.zeros(width, np.float32) + np.asarray(x, np.float32) for x in (low, high))
        return spaces.Box(lows, highs, dtype=np.float32)

    parts: dict[str, spaces.Space[Any]] = {
        "token": spaces.Discrete(config.vocab_size),
        "phase": spaces.Discrete(len(PHASES)),
        "progress": box(0.0, 1.0, 1),
        "token_nll": box(0.0, _NLL_BOUND, 1),
        "entropy": box(0.0, math.log(config.vocab_size), 1),
        "state": box(-_STATE_BOUND, _STATE_BOUND, state_features),
        "motion": box([0.0, -1.0], [_MOVED_BOUND, 1.0], 2),
        "last_skip": spaces.MultiBinary(config.layer_count),
    }
    if config.preview_layers:
        parts["window"] = box(0.0, config.paw_horizon, len(config.preview_layers))
    return spaces.Dict(parts)


def sign_projection(features: int, width: int) -> Tensor:
    """[S, d] of ±1, the same everywhere: a random projection keeps distances (Johnson and Lindenstrauss)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (features, width), generator=draw).float() * 2 - 1


def observe(
    space: spaces.Dict, projection_Sd: Tensor, reading: Reading, token: int, phase: Phase, progress: float,
    last_skip_L: Tensor | None,
) -> Observation:  # fmt: skip
    """An element of `space`, made of new arrays. Values beyond a bound are set to it."""
    layers = space["last_skip"].shape
    assert layers is not None
    nothing_L = np.zeros(layers, np.int8)
    unit_d = torch.nn.functional.normalize(reading.state_d, dim=0)
    before_11d, after_11d = (x.view(1, 1, -1) for x in (reading.earlier_d, reading.state_d))
    values = {
        "progress": [progress],
        "token_nll": [-float(reading.log_prob_V[token])],
        "entropy": [reading.entropy],
        "state": (projection_Sd @ unit_d).numpy(),
        "motion": Motion.between(before_11d, after_11d)[0, 0].numpy(),
        "window": reading.window_P.numpy(),
    }
    seen: Observation = {"token": np.int64(token), "phase": np.int64(PHASES.index(phase))}
    seen["last_skip"] = nothing_L if last_skip_L is None else last_skip_L.numpy().astype(np.int8)
    for name, value in values.items():
        if name in space.spaces:
            part = space[name]
            assert isinstance(part, spaces.Box)
            seen[name] = np.clip(np.asarray(value, np.float32), part.low, part.high)
    return {name: seen[name] for name in space.spaces}
