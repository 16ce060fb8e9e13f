"""Executed FLOPs against torch's own counter, and against the instantiated modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from fbs_rl.model import FBSCache, FBSConfig, FBSForCausalLM
from fbs_rl.model.flops import TraceCost, closed_chunks, count_trace
from tests.cost_variants import CAP, FAMILIES, VARIANTS, build, of_every_shape
from tests.tiny import HIDDEN, LAYERS, SMALL, VOCAB, backbone

GATED = [name for name in VARIANTS if name not in ("no gate", "backbone")]


@dataclass
class Recording:
    """A decoded row as the engine ran it, and torch's count of each step."""

    skip_LBT: Tensor
    closed_BT: Tensor
    opens_BT: Tensor
    flops_T: list[int]


def rotary_flops(decoder: Any, ids_B1: Tensor) -> int:
    """What a step's rotary positions cost: some versions of transformers make the angles by a product."""
    with FlopCounterMode(display=False) as counter:
        decoder.rotary_emb(decoder.embed_tokens(ids_B1), torch.zeros_like(ids_B1))
    return counter.get_total_flops()


@torch.no_grad()
def decode(model: FBSForCausalLM, ids_BT: Tensor, prompt: int, **gates: Any) -> Recording:
    """Feed ids_BT behind a prompt, one token a call, under torch's counter."""
    model(ids_BT[:, :3])  # makes E_r and the mean horizon map, which are kept
    cache = FBSCache(model.config.layer_count)
    if prompt:
        model(ids_BT[:, :prompt], past_key_values=cache, gates="dense")
    skips, closed, opens, counted = [], [], [], []
    for t in range(prompt, ids_BT.shape[1]):
        before = cache.chunks
        closed.append(before.closed_B if before else torch.zeros(len(ids_BT), dtype=torch.long))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(ids_BT[:, t : t + 1], past_key_values=cache, decode_start=prompt, **gates)
        counted.append(counter.get_total_flops() - rotary_flops(model.model, ids_BT[:, :1]))
        skips.append(out.skip)
        if cache.chunks is None:
            opens.append(torch.zeros(len(ids_BT), dtype=torch.bool))
        else:
            opens.append(cache.chunks.open_size_B == 1)
    return Recording(torch.cat(skips, 2), torch.stack(closed, 1), torch.stack(opens, 1), counted)


def count(model: FBSForCausalLM, run: Recording, prompt: int, gates_on: bool) -> TraceCost:
    start_B = torch.full(run.skip_LBT.shape[1:2], prompt)
    return count_trace(model.config, run.skip_LBT, start_B, gates_on, run.closed_BT, run.opens_BT)


def some_ids(length: int, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def phrased_ids(model: FBSForCausalLM, prompt: int, length: int, **gates: Any) -> Tensor:
    """Tokens of which some decoded ones open a chunk and some continue one, with more chunks than are in sight."""
    if not model.config.chunk:
        return some_ids(length)
    for seed in range(100):
        ids = some_ids(length, seed)
        taps = model(ids, decode_start=prompt, **gates).taps
        opened = int(taps.chunks.opens_BT.sum())
        opened_late = int(taps.chunks.opens_BT[:, max(prompt, 1) :].sum())
        if 0 < opened_late < length - max(prompt, 1) and opened > CAP + 2:
            return ids
    raise AssertionError("no seed gives such chunks")


# --- against torch's counter --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "no paw", "no chunk", "no gate", "backbone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_steps_cost_what_torch_counts(family: str, variant: str) -> None:
    model = build(variant, family)
    run = decode(model, some_ids(13), 10, gates="dense")
    cost = count(model, run, 10, gates_on=False)
    assert cost.flops_BT[0].tolist() == run.flops_T
    assert torch.equal(cost.flops_BT, cost.dense_flops_BT)
    assert torch.equal(cost.flops_BT, cost.backbone_flops_BT) == (variant == "backbone")
    assert cost.executed_frac == cost.paper_ratio == 1.0


def check_gated(model: FBSForCausalLM, prompt: int, length: int, **gates: Any) -> None:
    run = decode(model, phrased_ids(model, prompt, length, **gates), prompt, **gates)
    cost = count(model, run, prompt, gates_on=True)
    assert cost.flops_BT[0].tolist() == run.flops_T
    assert 0.1 < cost.skip_ratio < 0.9
    assert not model.config.chunk or int(run.closed_BT.max()) > CAP
    assert prompt or torch.equal(closed_chunks(run.opens_BT), run.closed_BT)


@pytest.mark.parametrize("variant", GATED)
def test_gated_steps_cost_what_torch_counts(variant: str) -> None:
    family = FAMILIES[GATED.index(variant) % 2]
    check_gated(build(variant, family), prompt=10, length=14, gates="threshold", tau=0.5)


@pytest.mark.parametrize(("family", "variant"), [("qwen3", "default"), ("llama", "paper")])
def test_a_trace_without_a_prompt_costs_what_torch_counts(family: str, variant: str) -> None:
    check_gated(build(variant, family), prompt=0, length=8, gates="sample", gate_seed=3)


def test_replayed_steps_compute_no_gate() -> None:
    model = build(kv_on_skip="noop")
    skip_LBT = torch.zeros(LAYERS, 1, 1, dtype=torch.bool)
    skip_LBT[[0, 4, 5, 7]] = True
    run = decode(model, some_ids(12), 9, gates="replay", skip=skip_LBT)
    cost = count(model, run, 9, gates_on=False)
    assert cost.flops_BT[0].tolist() == run.flops_T
    assert cost.components["gates"] == 0 and cost.skip_ratio == 0.5


def test_rows_of_a_batch_that_agree_cost_what_torch_counts() -> None:
    model = build(family="qwen3")
    run = decode(model, some_ids(12).repeat(3, 1), 9, gates="threshold", tau=0.5)
    cost = count(model, run, 9, gates_on=True)
    assert cost.flops_BT.sum(0).tolist() == run.flops_T


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_backbone_costs_what_transformers_runs(family: str) -> None:
    plain, ids = backbone(family), some_ids(13)
    cache, counted = DynamicCache(), []
    with torch.no_grad():
        plain(ids[:, :9], past_key_values=cache)
        for t in range(9, 13):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                plain(ids[:, t : t + 1], past_key_values=cache)
            counted.append(counter.get_total_flops() - rotary_flops(plain.model, ids[:, :1]))
    skip_LBT = torch.zeros(LAYERS, 1, 4, dtype=torch.bool)
    config = FBSConfig(**SMALL).bound_to(plain.config)
    cost = count_trace(config, skip_LBT, torch.tensor([9]), gates_on=False)
    assert cost.backbone_flops_BT[0].tolist() == counted


# --- against the instantiated modules ----------------------------------------------------------------


def weight_macs(module: nn.Module) -> int:
    """MACs of every linear layer below `module`, applied once."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def macs_of_token(
    model: FBSForCausalLM, ran_L: list[bool], keys_L: list[int], chunks: int, closes: bool, gates: bool
) -> int:  # fmt: skip
    """Closed form for one token, layer by layer, from the shapes of the weights."""
    config: Any = model.config
    total, head, seen_preview = model.lm_head.weight.numel(), model.model.preview, False
    if model.model.boundary is not None:
        total += model.model.boundary.classify.weight.numel()
    for index, layer in enumerate(model.model.fbs_layers()):
        attention: Any = layer.self_attn
        if layer.paw is not None:
            assert head is not None
            horizons, rank, _ = head.horizon_maps.shape
            if not seen_preview:
                total += rank * rank + len(head.token_ids_N) * rank
            seen_preview = True
            expected = HIDDEN if config.paw_embed_space == "full" else rank
            total += head.state_proj.weight.numel() + head.horizon_maps.numel()
            total += horizons * head.shortlist_size * (rank + expected)
            for name, part in layer.paw.named_children():
                if name in ("window_in", "window_out"):
                    total += weight_macs(part)
                if name == "mix":
                    assert isinstance(part.weight, Tensor)
                    times = horizons if isinstance(part, nn.Conv1d) else 1
                    total += part.weight.numel() * times
            total += layer.paw.up.weight.numel() if ran_L[index] else 0
        reader = layer.chunk_reader
        if reader is not None:
            if ran_L[index]:
                total += reader.query.weight.numel() + reader.out.weight.numel()
                total += 2 * (1 + min(chunks, reader.cap)) * reader.null_key.numel()
            if closes:
                total += weight_macs(reader.summarise) + weight_macs(reader.key)
                total += weight_macs(reader.value)
        if gates and layer.skip_gate is not None:
            total += weight_macs(layer.skip_gate)
        if ran_L[index]:
            total += weight_macs(attention) + weight_macs(layer.mlp)
            total += 2 * keys_L[index] * attention.q_proj.out_features
        else:
            total += weight_macs(layer.skip_path)
            if config.kv_on_skip == "project":
                total += weight_macs(attention.k_proj) + weight_macs(attention.v_proj)
    return total


def random_trace(config: FBSConfig, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    skip_LBT = torch.rand(LAYERS, 3, length, generator=generator) < 0.4
    skip_LBT[sorted(config.protected_layers)] = False
    closed_BT = torch.randint(0, 9, (3, length), generator=generator)
    return skip_LBT, closed_BT, torch.rand(3, length, generator=generator) < 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_skips_match_the_closed_form(variant: str) -> None:
    for model in of_every_shape(variant):
        check_closed_form(model)


def check_closed_form(model: FBSForCausalLM) -> None:
    config, noop = model.config, model.config.kv_on_skip == "noop"
    skip_LBT, closed_BT, opens_BT = random_trace(config)
    start_B, valid_BT = torch.tensor([0, 4, 7]), torch.ones(3, 7, dtype=torch.bool)
    valid_BT[1, :2] = False  # left padding
    cost = count_trace(config, skip_LBT, start_B, config.gate, closed_BT, opens_BT, valid_BT)
    for row, start in enumerate(start_B.tolist()):
        entries_L, tokens = [start] * LAYERS, start
        for t in range(7):
            if not valid_BT[row, t]:
                assert cost.flops_BT[row, t] == cost.dense_flops_BT[row, t] == 0
                continue
            chunks, closes = int(closed_BT[row, t]), bool(opens_BT[row, t]) and tokens > 0
            ran_L = [not z for z in skip_LBT[:, row, t].tolist()]
            keys_L, all_L = [n + 1 for n in entries_L], [tokens + 1] * LAYERS
            taken = macs_of_token(model, ran_L, keys_L, chunks, closes, config.gate)
            dense = macs_of_token(model, [True] * LAYERS, all_L, chunks, closes, False)
            assert cost.flops_BT[row, t] == 2 * taken
            assert cost.dense_flops_BT[row, t] == 2 * dense
            entries_L = [n + (r or not noop) for n, r in zip(entries_L, ran_L, strict=True)]
            tokens += 1
    assert sum(cost.components.values()) == int(cost.flops_BT.sum())
    skipped = int((skip_LBT & valid_BT).sum())
    assert cost.skip_ratio == pytest.approx(skipped / (LAYERS * int(valid_BT.sum())))
    dense_total = int(cost.dense_flops_BT.sum())
    assert cost.executed_frac == pytest.approx(int(cost.flops_BT.sum()) / dense_total)


def test_tokens_that_are_not_counted_still_leave_keys() -> None:
    config = build(kv_on_skip="noop").config
    skip_LBT, closed_BT, opens_BT = random_trace(config)
    start_B, counted_BT = torch.tensor([0, 4, 7]), torch.arange(7).expand(3, 7) >= 3
    whole = count_trace(config, skip_LBT, start_B, True, closed_BT, opens_BT)
    part = count_trace(config, skip_LBT, start_B, True, closed_BT, opens_BT, counted_BT=counted_BT)
    assert torch.equal(part.flops_BT, whole.flops_BT * counted_BT)
    assert torch.equal(part.dense_flops_BT, whole.dense_flops_BT * counted_BT)
    assert part.skip_ratio == pytest.approx(float(skip_LBT[:, :, 3:].float().mean()))
