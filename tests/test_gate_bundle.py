"""Gates between processes: names, the way through bytes, and copies that happen whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fbs_rl.checkpoint import tensors_digest
from fbs_rl.gate_bundle import (
    GateBundle,
    GateParts,
    apply_bundle,
    digest_of,
    gate_tensors,
    held_digest,
)
from fbs_rl.model import FBSForCausalLM
from tests.tiny import enliven, fresh, left_padded, lively

IDS, MASK = left_padded(1, [22, 15])
MIXED = {
    "b.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "a.bias": torch.tensor([1.5, -2.0]),
    "scalar": torch.tensor(0.25),
    "empty": torch.zeros(0, 4),
}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", list(GateParts))
@pytest.mark.parametrize("block", [1, 3])
def test_the_names_are_the_checkpoints(parts: GateParts, block: int) -> None:
    model = fresh(gate_block=block)
    found, state = gate_tensors(model, parts), model.state_dict()
    wanted = {name for name in state if ".skip_gate." in name}
    if parts is GateParts.GATES_AND_PAW:
        wanted |= {n for n in state if ".paw." in n or n.startswith("model.preview.")}
        wanted -= {"model.preview.token_ids_N", "model.preview.log_prior_N"}  # PPO leaves these
    assert set(found) == wanted and "model.layers.3.skip_gate.hidden.weight" in found
    parameters = dict(model.named_parameters())
    assert all(found[name] is parameters[name] for name in found)


class Engine(nn.Module):
    """Another tree of the same modules, as an engine of its own would build it."""

    def __init__(self, model: FBSForCausalLM) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList()
        for layer in model.model.fbs_layers():
            wrapped = nn.Module()
            wrapped.gate, wrapped.look = layer.skip_gate, layer.paw
            self.decoder.layers.append(wrapped)
        self.expectations = model.model.preview


def test_other_trees_give_the_same_names() -> None:
    model = lively()
    wanted = gate_tensors(model, "gates+paw")
    trees = (model.model, nn.ModuleDict({"module": model}), Engine(model))
    for tree in trees:
        found = gate_tensors(tree, "gates+paw")
        assert found.keys() == wanted.keys() and all(found[n] is wanted[n] for n in wanted)


def test_trees_that_give_no_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of gates, gates\\+paw"):
        gate_tensors(lively(), "paw")
    with pytest.raises(ValueError, match="has no gates"):
        gate_tensors(lively(gate=False), "gates+paw")
    with pytest.raises(ValueError, match=r"SkipGate lies at 'alone'; it must lie in a layer"):
        gate_tensors(nn.ModuleDict({"alone": lively().model.layers[3].skip_gate}), "gates")
    with pytest.raises(ValueError, match=r"skip_gate\..* occurs twice"):
        gate_tensors(nn.ModuleDict({"policy": fresh(), "reference": fresh()}), "gates")


# --- there and back -----------------------------------------------------------------------------------


def test_a_bundle_survives_the_way_through_bytes() -> None:
    bundle = GateBundle.of(12, MIXED)
    back = GateBundle.unpack(bundle.pack())
    assert (back.version, back.digest) == (12, bundle.digest) and same(back.tensors, MIXED)
    assert {n: t.dtype for n, t in back.tensors.items()} == {n: t.dtype for n, t in MIXED.items()}
    assert bundle.digest == digest_of(MIXED) == tensors_digest(MIXED)


def test_a_bundle_is_a_copy() -> None:
    weight = torch.arange(6.0).view(2, 3)
    bundle = GateBundle.of(0, {"w": weight.t()})
    weight.zero_()
    assert bundle.tensors["w"].is_contiguous()
    assert torch.equal(bundle.tensors["w"], torch.arange(6.0).view(2, 3).t())
    parameter = nn.Parameter(torch.ones(2))
    assert not GateBundle.of(0, {"p": parameter}).tensors["p"].requires_grad


def test_the_digest_sees_everything_but_the_version_and_the_order() -> None:
    bundle = GateBundle.of(1, MIXED)
    assert GateBundle.of(2, dict(reversed(MIXED.items()))).digest == bundle.digest
    changed = [
        {**MIXED, "scalar": torch.tensor(0.25).double()},
        {**MIXED, "a.bias": torch.tensor([[1.5, -2.0]])},
        {**MIXED, "a.bias": torch.tensor([-2.0, 1.5])},
        {**{n: t for n, t in MIXED.items() if n != "empty"}},
        {("c.weight" if n == "b.weight" else n): t for n, t in MIXED.items()},
    ]
    assert len({bundle.digest, *(digest_of(tensors) for tensors in changed)}) == 6


def test_any_flipped_bit_and_any_lost_tail_is_noticed() -> None:
    packed = GateBundle.of(3, {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(1)}).pack()
    header = int.from_bytes(packed[:8], "little")
    for place in range(len(packed)):
        altered = bytearray(packed)
        altered[place] ^= 1
        with pytest.raises(ValueError, match=r"send (it again|what pack)"):
            GateBundle.unpack(bytes(altered))
    for length in (0, 5, 8, 8 + header // 2, 8 + header, len(packed) - 1):
        with pytest.raises(ValueError, match="no whole gate bundle"):
            GateBundle.unpack(packed[:length])
    assert GateBundle.unpack(packed).version == 3


def test_foreign_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="no gate bundle of the kind"):
        GateBundle.unpack(save({"w": torch.ones(2)}))
    with pytest.raises(ValueError, match="no whole gate bundle"):
        GateBundle.unpack(b'{"version": 3}' * 40)


def test_bundles_without_content_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        GateBundle.of(0, {})
    with pytest.raises(ValueError, match="counts from 0, got -1"):
        GateBundle.of(-1, MIXED)


# --- applied ------------------------------------------------------------------------------------------


def decisions(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, MASK, gates="threshold", tau=0.5).skip


def test_applied_gates_decide_as_those_they_were_taken_from() -> None:
    source, target = lively(), fresh()
    before = values(target)
    first = decisions(target)
    taken = GateBundle.of(1, gate_tensors(source, "gates"))
    apply_bundle(gate_tensors(target, "gates+paw"), GateBundle.unpack(taken.pack()))
    assert not torch.equal(decisions(target), first)
    after = values(target)
    assert {n for n in after if not torch.equal(after[n], before[n])} <= taken.tensors.keys()
    assert digest_of(gate_tensors(target, "gates")) == taken.digest
    # What the gates read must be the source's too before decisions can agree.
    target.load_state_dict(
        {k: v for k, v in source.state_dict().items() if "skip_gate" not in k}, strict=False
    )
    target.model.forget_derived()
    assert torch.equal(decisions(target), decisions(source))


def test_previews_travel_too() -> None:
    source, target = lively(), enliven(fresh(), seed=6)
    decisions(target)  # fills what the preview keeps between calls
    apply_bundle(
        gate_tensors(target, "gates+paw"), GateBundle.of(4, gate_tensors(source, "gates+paw"))
    )
    target.model.forget_derived()
    rest = {
        n: t for n, t in source.state_dict().items() if n not in gate_tensors(source, "gates+paw")
    }
    target.load_state_dict(rest, strict=False)
    assert torch.equal(decisions(target), decisions(source))


def test_values_are_converted_and_inference_tensors_can_be_written() -> None:
    bundle = GateBundle.of(0, {"w": torch.tensor([1.0009765625, 3.0])})
    plain = torch.zeros(2, dtype=torch.bfloat16)
    with torch.inference_mode():
        frozen = torch.zeros(2)
    for target, wanted in ((plain, [1.0, 3.0]), (frozen, [1.0009765625, 3.0])):
        apply_bundle({"w": target}, bundle)
        assert target.tolist() == wanted
        assert held_digest({"w": target}, bundle) == bundle.digest
        with torch.inference_mode():
            target[0] = 1.0625
        assert held_digest({"w": target}, bundle) == digest_of({"w": target}) != bundle.digest


def test_a_write_is_seen_by_what_depends_on_it() -> None:
    weight = nn.Parameter(torch.zeros(2))
    before = weight._version
    apply_bundle({"w": weight}, GateBundle.of(0, {"w": torch.ones(2)}))
    assert weight._version > before and weight.requires_grad


def _one(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Changes the last tensor, so that all others have been looked at by then."""

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last = list(tensors)[-1]
        return {**tensors, last: change(tensors[last])}

    return edit


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "unknown": (lambda t: {**t, "model.layers.99.w": torch.zeros(1)}, "1 tensors that this model lacks"),
    "shape": (_one(lambda x: x.unsqueeze(0)), "has shape"),
    "nan": (_one(lambda x: x * torch.nan), "not finite as torch.float32"),
    "overflow": (_one(lambda x: x.double() * 0 + 1e39), "not finite as torch.float32"),
    "integers": (_one(lambda x: x.long()), "is torch.int64 in the bundle"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_bundle_changes_nothing(case: str) -> None:
    edit, words = REFUSED[case]
    target = fresh()
    before = values(target)
    bundle = GateBundle.of(7, edit(gate_tensors(lively(), "gates")))
    with pytest.raises(ValueError, match=words) as caught:
        apply_bundle(gate_tensors(target, "gates"), bundle)
    assert "\n" not in str(caught.value) and same(values(target), before)


def test_tensors_that_changed_after_the_digest_are_refused() -> None:
    target = fresh()
    before = values(target)
    bundle = GateBundle.of(7, gate_tensors(lively(), "gates"))
    next(iter(bundle.tensors.values())).view(-1)[0] += 1
    with pytest.raises(ValueError, match="version 7 does not match its digest"):
        apply_bundle(gate_tensors(target, "gates"), bundle)
    assert same(values(target), before)
