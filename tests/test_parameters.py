"""Which parameters are trained, at which rate, and which of them decay."""

from __future__ import annotations

from typing import Any

import pytest

from fbs_rl.training.parameters import parameter_groups, parameter_kinds, set_trained
from fbs_rl.training.settings import OptimizerSettings
from tests.tiny import LAYERS, backbone, fresh

ADAMW = OptimizerSettings(lr_backbone=1.0, lr_new=2.0, lr_gate=3.0, weight_decay=0.1)
RATES = {"backbone": 1.0, "new": 2.0, "gate": 3.0}


def trained_names(model: Any, what: str) -> set[str]:
    set_trained(model, what)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_backbones_parameters_are_those_it_had(family: str, tied: bool) -> None:
    model = fresh(family, tied, bias=True, segment_position=True)
    kinds = parameter_kinds(model)
    assert set(kinds) == {name for name, _ in model.named_parameters()}
    own = {name for name, kind in kinds.items() if kind == "backbone"}
    assert own == {name for name, _ in backbone(family, tied, bias=True).named_parameters()}


def test_gates_and_skip_paths_are_told_from_other_new_modules() -> None:
    model = fresh()
    kinds = parameter_kinds(model)
    gates = {name for name, kind in kinds.items() if kind == "gate"}
    modules = {name.split(".")[3] for name in gates}
    assert modules == {"skip_gate", "skip_path"}
    led = [i for i in range(LAYERS) if i not in model.config.protected_layers]
    assert {int(name.split(".")[2]) for name in gates if "skip_gate" in name} >= set(led)
    others = ("model.preview.", "model.boundary.")
    assert {kind for name, kind in kinds.items() if name.startswith(others)} == {"new"}
    assert not any("gate" in name and "mlp" not in name for name in set(kinds) - gates)


def test_what_is_trained_nests() -> None:
    model = fresh()
    every = {name for name, _ in model.named_parameters()}
    gates, new, everything = (trained_names(model, what) for what in ("gates", "new", "all"))
    assert gates < new < everything == every
    kinds = parameter_kinds(model)
    assert {kinds[name] for name in gates} == {"gate"}
    assert {kinds[name] for name in new} == {"gate", "new"}
    assert trained_names(model, "gates") == gates  # and back


@pytest.mark.parametrize("what", ["all", "new", "gates"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_trained_parameter_is_in_one_group(what: str, tied: bool) -> None:
    model = fresh(tied=tied, bias=True)
    wanted = trained_names(model, what)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = parameter_kinds(model)
    found = []
    for group in parameter_groups(model, ADAMW):
        names = [name_of[id(parameter)] for parameter in group["params"]]
        found += names
        assert {RATES[kinds[name]] for name in names} == {group["lr"]} == {group["peak_lr"]}
        decays = {parameter.ndim > 1 for parameter in group["params"]}
        assert decays == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)
    assert sorted(found) == sorted(wanted)


def test_norms_biases_and_strengths_do_not_decay() -> None:
    model = fresh(bias=True)
    set_trained(model, "all")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    still = {
        name_of[id(p)] for g in parameter_groups(model, ADAMW) if not g["weight_decay"] for p in g["params"]
    }  # fmt: skip
    ends = ("norm.weight", ".bias", "strength")
    assert {n for n in name_of.values() if n.endswith(ends)} <= still


def test_groups_come_in_the_same_order_in_every_process() -> None:
    """A resumed optimizer matches its state to groups by place."""
    keys = []
    for _ in range(2):
        model = fresh()
        set_trained(model, "all")
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        keys.append([[name_of[id(p)] for p in g["params"]] for g in parameter_groups(model, ADAMW)])
    assert keys[0] == keys[1]


def test_sizes_are_read_where_zero_3_keeps_them() -> None:
    """ZeRO-3 leaves empty tensors behind, with the true shape in ds_shape."""
    model = fresh()
    set_trained(model, "gates")
    weight = model.model.layers[3].skip_gate.out.weight
    weight.ds_shape = weight.shape
    weight.data = weight.data.new_empty(0)
    (group,) = [g for g in parameter_groups(model, ADAMW) if any(p is weight for p in g["params"])]
    assert group["weight_decay"] == 0.1
