"""What PPO trains of a model, the float32 weights behind it, and the proof that the rest stayed as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fbs_rl.checkpoint import tensors_digest
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.learner_settings import LearnerSettings, Trains

_WINDOW = (".paw.window_in.", ".paw.window_out.")
_PAW = (".paw.", ".preview.")
_LOOKS_AHEAD = ".skip_gate.preview."  # W_2: a part of the gate, trained at PAW's rate (SPEC 8.5)


def set_trainable(model: FBSForCausalLM, trains: Trains) -> dict[str, nn.Parameter]:
    """Let gradients reach what `trains` names and nothing else; these parameters by checkpoint name.

    Raises ValueError for a model that lacks the parts.
    """
    if not model.config.gate:
        raise ValueError("this model has no gates to train; make it with gate on")
    found = {n: p for n, p in model.named_parameters() if _is_trained(n, trains)}
    if trains is not Trains.GATES and not any(".paw." in name for name in found):
        raise ValueError(
            f"trains is {trains!s}, but this model has no such part of PAW; set trains to gates"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def _is_trained(name: str, trains: Trains) -> bool:
    if ".skip_gate." in name:
        return True
    parts = {Trains.GATES: (), Trains.GATES_AND_WINDOW: _WINDOW, Trains.GATES_AND_PAW: _PAW}[trains]
    return any(part in name for part in parts)


def frozen_digest(model: nn.Module, trainable_names: Iterable[str]) -> str:
    """sha256 over every parameter and buffer of `model` but the named ones: equal as long as they are untouched."""
    trained = set(trainable_names)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tensors_digest({n: t for n, t in tensors.items() if n not in trained})


class MasterWeights:
    """Float32 copies of what trains, which AdamW moves; the model keeps them rounded to its own type.

    A step of 3e-5 is lost on a bf16 weight. The copies collect the gradients of all calls of a step too.
    No weight decay: the gates' way back is the KL term. Of one rank; actors/engine_weights.py is that of several.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], settings: LearnerSettings) -> None:
        self.named = dict(named)
        self.masters = {
            name: nn.Parameter(p.detach().to(torch.float32, copy=True)) for name, p in named.items()
        }
        rates = {
            "gates": settings.lr_gates,
            "paw": settings.lr_paw,
            "value": settings.lr_value,
        }
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            kinds.setdefault(_kind(name), []).append(master)
        groups = [{"params": p, "lr": rates[k], "peak_lr": rates[k]} for k, p in kinds.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    @property
    def description(self) -> str:
        return type(self.optimizer).__name__

    def set_rates(self, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = scale * group["peak_lr"]

    def clear_gradients(self) -> None:
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)

    def take_gradients(self) -> None:
        """Add the gradients of the call before to the step's, and drop them from the model."""
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                gradient = self.masters[name].grad
                assert gradient is not None
                gradient += parameter.grad
                parameter.grad = None

    def step(self, limit: float) -> float:
        """Apply the collected gradients, clipped to norm `limit`, and round the result into the model.

        Returns the norm before clipping; where it is not finite nothing was applied.
        """
        self.sum_over_ranks()
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([m.grad for m in masters if m.grad is not None])
        if bool(norm.isfinite()):
            torch.nn.utils.clip_grads_with_norm_(masters, limit, norm)
            self.apply()
            self.write_back()
        return float(norm)

    def sum_over_ranks(self) -> None:
        """Make the collected gradients those of all ranks; there is one."""

    def apply(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def write_back(self) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(self.masters[name])

    def state_dict(self) -> dict[str, object]:
        weights = {name: master.detach().clone() for name, master in self.masters.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Raises ValueError for the state of other parameters."""
        weights, optimizer = state["weights"], state["optimizer"]
        assert isinstance(weights, dict) and isinstance(optimizer, dict)
        odd = sorted(weights.keys() ^ self.masters.keys())
        if odd:
            raise ValueError(
                f"the saved learner trained other parameters ({len(odd)} differ, {odd[0]} first); "
                f"go on with the settings it was saved under"
            )
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.optimizer.load_state_dict(optimizer)
        self.write_back()


def _kind(name: str) -> str:
    if name.startswith("value."):
        return "value"
    return "gates" if ".skip_gate." in name and _LOOKS_AHEAD not in name else "paw"
