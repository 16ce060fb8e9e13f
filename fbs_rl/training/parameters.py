"""Which parameters a phase trains, and at which rate."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.training.settings import OptimizerSettings

_GATE_PARTS = (".skip_gate.", ".skip_path.")
_LAYER_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..+\.weight")


def set_trained(model: FBSForCausalLM, what: str) -> None:
    """Let `what` (all, new or gates) be trained and freeze the rest."""
    allowed = {"all": ("backbone", "new", "gate"), "new": ("new", "gate"), "gates": ("gate",)}[what]
    kinds = parameter_kinds(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kinds[name] in allowed)


def parameter_kinds(model: FBSForCausalLM) -> dict[str, str]:
    """By name: backbone, new (PAW, Chunk-Head) or gate (Skip-Gate and skip path)."""
    new = {f"model.{name}" for name, _ in model.model.new_parameters()}
    return {
        name: "backbone"
        if name not in new
        else "gate"
        if any(part in name for part in _GATE_PARTS)
        else "new"
        for name, _ in model.named_parameters()
    }


def parameter_groups(model: FBSForCausalLM, optimizer: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups for AdamW of what is trained, each with the rate it has at the top of the schedule as `peak_lr`.

    Vectors and scalars (norms, biases, strengths) are not decayed.
    """
    rates = {
        "backbone": optimizer.lr_backbone,
        "new": optimizer.lr_new,
        "gate": optimizer.lr_gate,
    }
    kinds = parameter_kinds(model)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the tensor
            groups.setdefault((kinds[name], len(shape) > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": rates[kind],
            "peak_lr": rates[kind],
            "weight_decay": optimizer.weight_decay if decays else 0.0,
        }
        for (kind, decays), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def is_sharded(name: str, dimensions: int) -> bool:
    """Whether ZeRO-3 spreads the parameter of this name over the ranks: the matrices of the backbone's layers.

    They are nearly all of a large model, and run as modules, in one order on every rank. The rest is read by other
    modules too (embedding, previews, norms), or too small to be worth a collective.
    """
    return dimensions > 1 and _LAYER_MATRIX.fullmatch(name) is not None
