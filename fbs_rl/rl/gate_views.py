"""What gates saw in a replay, so that they can be asked again without running the model.

Where gates alone train, the actions that are replayed fix everything that a gate reads. So one pass a batch finds it,
and whatever an update asks after that (the reference, every epoch) are the gates' own small products.

Shape letters: L layers, B rows, C gate columns, E width of a pooled preview.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_gate import Foresight, SkipGate
from fbs_rl.rl.replay import ReplayBatch, replay
from fbs_rl.types import GateInputs

_FLOAT32_BYTES = 4
View = tuple[Tensor, Tensor, Foresight | None]
"""The arguments of SkipGate.forward, at a batch's columns."""


@dataclass(frozen=True, slots=True)
class _Sight:
    """A Foresight at a batch's columns."""

    pooled_BTE: Tensor
    entropy_BT: Tensor


@dataclass(frozen=True, slots=True)
class GateViews:
    """What the gates of a batch read. of_layer: by leader.

    acts_BC: where a column is no padding. state_BCd: as in Replayed.
    """

    of_layer: Mapping[int, View]
    acts_BC: Tensor
    state_BCd: Tensor | None = None

    def probabilities(
        self,
        model: FBSForCausalLM,
        never_skip: Sequence[int] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """p [L, B, C] as replay() finds it, with gradient to the gates. tensors: as there."""
        config, gates = model.config, _gates(model)
        forced = config.forced_layers(tuple(never_skip))
        nothing_BC = torch.zeros_like(self.acts_BC, dtype=torch.float32)
        prob: list[Tensor] = []
        asked_BC = nothing_BC
        for layer in range(config.layer_count):
            known_BC = asked_BC
            if config.block_asked_at(layer):
                view = self.of_layer.get(layer)
                asked_BC = nothing_BC
                if view is not None:
                    logit_BC = _ask(gates[layer], f"model.layers.{layer}.skip_gate.", view, tensors)
                    asked_BC = torch.where(self.acts_BC, torch.sigmoid(logit_BC), 0.0)
            decided_BC = known_BC if config.gate_ahead else asked_BC
            prob.append(nothing_BC if layer in forced else decided_BC)
        return torch.stack(prob)


def see(
    model: FBSForCausalLM,
    batch: ReplayBatch,
    never_skip: Sequence[int] = (),
    state_layer: int | None = None,
) -> GateViews:
    """Replay a batch once, without gradient, and keep what its gates read at their columns; errors as of replay()."""
    views: dict[int, View] = {}
    # By identity, since gates up to the next PAW layer share a glance; it is held, or another could take its identity.
    sights: dict[int, tuple[Foresight, Foresight]] = {}

    def keep(layer: int, normed: Tensor, motion: Tensor, glance: Foresight | None) -> None:
        sight = None
        if glance is not None:
            if id(glance) not in sights:
                seen = (glance.pooled_BTE, glance.entropy_BT)
                sights[id(glance)] = glance, _Sight(*(_columns(t, batch.place_BC) for t in seen))
            sight = sights[id(glance)][1]
        views[layer] = (_columns(normed, batch.place_BC), _columns(motion, batch.place_BC), sight)

    with torch.no_grad(), _watched(_gates(model), keep):
        found = replay(model, batch, never_skip, state_layer=state_layer)
    return GateViews(
        views, batch.place_BC > 0, found.state_BCd
    )  # a prompt has a token, so no column stands at 0


def view_bytes(config: FBSConfig, columns: int, number_bytes: int) -> int:
    """Memory that the views of so many columns take, padding included. number_bytes: of the model's type."""
    inputs = GateInputs(config.gate_inputs)
    each = 0
    if inputs is not GateInputs.PREVIEW:
        each += len(config.gate_leaders) * (config.hidden_size * number_bytes + 2 * _FLOAT32_BYTES)
    if inputs is not GateInputs.RESIDUAL:
        each += len(config.preview_layers) * (config.pooled_width * number_bytes + _FLOAT32_BYTES)
    return columns * each


def _gates(model: FBSForCausalLM) -> dict[int, SkipGate]:
    return {
        layer.index: layer.skip_gate
        for layer in model.model.fbs_layers()
        if layer.skip_gate is not None
    }


@contextmanager
def _watched(gates: Mapping[int, SkipGate], keep: Callable[..., None]) -> Iterator[None]:
    """Let `keep` have a gate's layer and arguments whenever it is asked."""
    handles = [
        gate.register_forward_pre_hook(lambda _, given, layer=layer: keep(layer, *given))
        for layer, gate in gates.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _columns(tensor_BTX: Tensor, place_BC: Tensor) -> Tensor:
    """A copy of the columns alone."""
    rows = torch.arange(len(place_BC), device=place_BC.device).unsqueeze(1)
    return tensor_BTX[rows, place_BC]


def _ask(
    gate: SkipGate,
    prefix: str,
    view: View,
    tensors: Mapping[str, Tensor] | None,
) -> Tensor:
    if tensors is None:
        return gate(*view)
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return functional_call(gate, own, view)
