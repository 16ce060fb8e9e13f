from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config

from fbs_rl.model import FBSCache, FBSConfig, FBSForCausalLM
from fbs_rl.model.cost_model import CostModel
from fbs_rl.model.flops import (
    TraceCost,
    closed_chunks,
    count_trace,
    parameter_counts,
    step_bytes,
    visible_keys,
)
from tests.tiny import HIDDEN, LAYERS, NOOP, SMALL, VOCAB, backbone, fresh, lively

CAP = 2  # closed chunks in sight, few enough that short runs meet the limit
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": NOOP,
    "noop, adapter": {"kv_on_skip": "noop"},
    "project, identity": {"skip_path": "identity"},
    "no paw": {"paw": False, "gate_inputs": "residual"},
    "no chunk": {"chunk": False},
    "no gate": {"gate": False},
    "backbone": {"paw": False, "chunk": False, "gate": False},
    "fixed window, mean": {"paw_window": "fixed", "paw_compression": "mean"},
    "linear, preview gate": {"paw_compression": "linear", "gate_inputs": "preview"},
    "none, every layer": {"paw_compression": "none", "paw_layers": "all", "gate_block": 2},
    "full space": {"paw_embed_space": "full", "gate_block": 3, "never_skip": (0, -1, -2)},
    "segments": {"segment_position": True},
}
GATED = [name for name in VARIANTS if name not in ("no gate", "backbone")]
FAMILIES = ("llama", "qwen3")
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
}
# (hidden size, feed-forward width, layers, query heads) of the other Qwen3 sizes of SPEC 6.2
OTHER_QWEN3 = {"1.7B": (2048, 6144, 28, 16), "0.6B": (1024, 3072, 28, 16)}


def build(variant: str = "default", family: str = "llama", **made_of: Any) -> FBSForCausalLM:
    return lively(family, **{"chunk_cache": CAP, **VARIANTS[variant], **made_of})


def of_every_shape(variant: str) -> list[FBSForCausalLM]:
    """Biases in attention, a tied table, biases in the MLP."""
    fields: dict[str, Any] = backbone().config.to_dict() | {"mlp_bias": True}
    biased = LlamaForCausalLM(LlamaConfig(**fields))
    made_of = {"chunk_cache": CAP, **VARIANTS[variant]}
    return [
        fresh("llama", bias=True, **made_of),
        fresh("qwen3", tied=True, **made_of),
        FBSForCausalLM.from_backbone(biased, FBSConfig(**{**SMALL, **made_of})),
    ]


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


# --- what the numbers mean ------------------------------------------------------------------------------


def qwen3_config(**options: Any) -> FBSConfig:
    geometry = {**QWEN3_4B, **{k: options.pop(k) for k in list(options) if k in QWEN3_4B}}
    return FBSConfig(**options).bound_to(Qwen3Config(**geometry))


def overhead_frac(config: FBSConfig, visible_chunks: int, close_every: int) -> float:
    """What the modules add to a dense decode at context 0, gates computed but never skipping."""
    shape = (1, close_every)
    skip_LBT = torch.zeros(config.layer_count, 1, 1, dtype=torch.bool).expand(-1, *shape)
    opens_BT = (torch.arange(close_every) == 1).view(shape)
    cost = count_trace(
        config, skip_LBT, torch.zeros(1).long(), True, torch.full(shape, visible_chunks), opens_BT
    )
    attention = cost.components["attention"]
    backbone = int(cost.backbone_flops_BT.sum()) - attention
    return (int(cost.flops_BT.sum()) - attention) / backbone - 1


def test_qwen3_4b_figures_of_the_specification() -> None:
    config = qwen3_config()
    cost = CostModel.of(config)
    assert cost.head.macs == 151936 * 2560
    assert 36 * cost.layer_macs(0) + cost.head.macs == 4_022_272_000
    assert cost.key_value.macs / cost.layer_macs(0) == pytest.approx(0.052, abs=5e-4)
    assert cost.adapter.macs / cost.layer_macs(0) == pytest.approx(0.0016, abs=1e-4)
    # SPEC: 0.68 %. First without chunks, then with 100 in sight and one closing every third token.
    assert overhead_frac(config, 0, 1) == pytest.approx(0.006684, abs=1e-6)
    assert overhead_frac(config, 100, 3) == pytest.approx(0.006918, abs=1e-6)


@pytest.mark.parametrize(("size", "percent"), [("1.7B", 1.19), ("0.6B", 2.38)])
def test_smaller_qwen3_figures_of_the_specification(size: str, percent: float) -> None:
    hidden, ff, layers, heads = OTHER_QWEN3[size]
    config = qwen3_config(
        hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads
    )  # fmt: skip
    assert 100 * overhead_frac(config, 100, 3) == pytest.approx(percent, rel=0.05)


def skips_of(config: FBSConfig, tokens: int, ratio: float) -> Tensor:
    """[L, 1, tokens] with exactly `ratio` of all decisions skipping, none in a protected layer."""
    free = sorted(set(range(config.layer_count)) - config.protected_layers)
    skip_LT = torch.zeros(config.layer_count, tokens, dtype=torch.bool)
    order = torch.randperm(len(free) * tokens, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(free) * tokens, dtype=torch.bool)
    chosen[order[: round(ratio * config.layer_count * tokens)]] = True
    skip_LT[free] = chosen.view(len(free), tokens)
    return skip_LT.unsqueeze(1)


@pytest.mark.parametrize(("policy", "expected"), [("project", 0.70), ("noop", 0.68)])
def test_equation_4_understates_the_cost(policy: str, expected: float) -> None:
    config = qwen3_config(kv_on_skip=policy)
    skip_LBT = skips_of(config, tokens=100, ratio=0.36)
    cost = count_trace(config, skip_LBT, torch.tensor([200]), gates_on=True)
    assert cost.paper_ratio == pytest.approx(0.64)
    assert cost.executed_frac == pytest.approx(expected, abs=0.01)
    assert f"{cost.executed_frac:.4f}" in cost.describe() and "0.6400" in cost.describe()
    assert "lm_head" in cost.describe()


def test_noop_sees_fewer_keys_than_project() -> None:
    noop, project = qwen3_config(kv_on_skip="noop"), qwen3_config(kv_on_skip="project")
    skip_LBT, start_B = skips_of(noop, tokens=50, ratio=0.4), torch.tensor([10])
    keys_noop, keys_project = (visible_keys(c, skip_LBT, start_B) for c in (noop, project))
    assert torch.equal(keys_project, torch.arange(11, 61).expand(36, 1, 50))
    boundary = noop.boundary_layer
    assert torch.equal(keys_noop[boundary], keys_project[boundary])
    assert bool((keys_noop <= keys_project).all()) and int(keys_noop[0, 0, -1]) < 60
    attention = [
        count_trace(c, skip_LBT, start_B, True).components["attention"] for c in (noop, project)
    ]
    assert attention[0] < attention[1]


def test_what_does_not_fit_is_refused() -> None:
    config = build().config
    skip_LBT, start_B = torch.zeros(LAYERS, 2, 3, dtype=torch.bool), torch.tensor([1, 1])
    skip_LBT[config.boundary_layer] = True
    with pytest.raises(ValueError, match="never skip"):
        count_trace(config, skip_LBT, start_B, True)
    with pytest.raises(ValueError, match="8 layers"):
        count_trace(config, skip_LBT[:4], start_B, True)
    with pytest.raises(ValueError, match="one length a row"):
        count_trace(config, skip_LBT & False, start_B[:1], True)
    with pytest.raises(ValueError, match="together"):
        count_trace(config, skip_LBT & False, start_B, True, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no token"):
        count_trace(config, skip_LBT & False, start_B, True, valid_BT=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no gates"):
        count_trace(build("no gate").config, skip_LBT & False, start_B, True)
    with pytest.raises(ValueError, match="bound_to"):
        CostModel.of(FBSConfig())


# --- bytes and parameters ---------------------------------------------------------------------------------

TRAINING_ONLY = ("embed_proj", "unk_R", "consistency")


def sizes(module: nn.Module | None) -> int:
    """Parameters that decoding reads."""
    named = [] if module is None else module.named_parameters()
    return sum(p.numel() for n, p in named if not any(part in n for part in TRAINING_ONLY))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_that_runs_everything_reads_every_weight(variant: str) -> None:
    for model in of_every_shape(variant):
        check_full_step(model)


def check_full_step(model: FBSForCausalLM) -> None:
    config, parts = model.config, model.model
    free = [layer for layer in range(LAYERS) if layer not in config.protected_layers]
    skip_LB = torch.zeros(LAYERS, 2, dtype=torch.bool)
    skip_LB[free, 1] = True  # row 0 runs every layer, row 1 uses every adapter
    keys_LB = torch.tensor([[5, 7]]).expand(LAYERS, 2)
    chunks_B, closing_B = torch.tensor([1, 9]), torch.tensor([True, False])
    moved = step_bytes(config, skip_LB, keys_LB, config.gate, 2, 4, chunks_B, closing_B)
    weights = sum(sizes(m) for m in (parts.layers, parts.norm, parts.boundary, model.lm_head))
    if (head := parts.preview) is not None:
        shared = head.state_proj.weight.numel() + head.horizon_maps.numel()
        rank, size = config.paw_rank, len(head.token_ids_N)
        weights += len(config.preview_layers) * shared + rank * rank + size * rank + size
    assert moved.weights == 2 * weights
    gathered = 1 + 3 * config.segment_position
    if config.paw_embed_space == "full":
        gathered += config.paw_shortlist
    assert moved.rows == 2 * 2 * gathered * HIDDEN
    entry = 4 * 2 * 2 * next(parts.fbs_layers()).head_dim
    bound = LAYERS - len(free)
    assert moved.kv_read == entry * (LAYERS * 5 + bound * 7)
    assert moved.kv_written == entry * (
        LAYERS + (LAYERS if config.kv_on_skip == "project" else bound)
    )
    chunk, readers = 4 * 2 * config.chunk_width, config.reader_layers
    open_sums = 4 * HIDDEN * 2 * len(readers)
    in_sight = len(readers) + CAP * sum(layer not in free for layer in readers)
    assert moved.chunks_read == chunk * in_sight + open_sums
    assert moved.chunks_written == chunk * len(readers) + open_sums
    caches = (moved.kv_read, moved.kv_written, moved.chunks_read, moved.chunks_written)
    assert moved.total == moved.weights + moved.rows + sum(caches)


@pytest.mark.parametrize("policy", ["project", "noop"])
def test_a_layer_that_nobody_runs_is_not_read(policy: str) -> None:
    model = build(family="qwen3", kv_on_skip=policy)
    layer: Any = model.model.layers[4]  # with PAW and chunk attention
    reader, attention = layer.chunk_reader, layer.self_attn
    keys_LB = torch.ones(LAYERS, 2, dtype=torch.long)
    none_LB = torch.zeros(LAYERS, 2, dtype=torch.bool)
    skip_LB = none_LB.clone()
    skip_LB[4] = True
    before = step_bytes(model.config, none_LB, keys_LB, True, 1, 1)
    after = step_bytes(model.config, skip_LB, keys_LB, True, 1, 1)
    norms = sizes(layer.input_layernorm) + sizes(layer.post_attention_layernorm)
    spared = sizes(attention) + sizes(layer.mlp) + norms
    spared += sizes(layer.paw.up) + sizes(layer.paw.up_norm) + layer.paw.strength.numel()
    spared += sizes(reader) - sum(map(sizes, (reader.summarise, reader.key, reader.value)))
    if policy == "project":
        still_read = (attention.k_proj, attention.v_proj, attention.k_norm, layer.input_layernorm)
        spared -= sum(map(sizes, still_read))
    assert before.weights - after.weights == spared - sizes(layer.skip_path)
    entry = 2 * 2 * layer.head_dim
    assert before.kv_read - after.kv_read == 2 * entry
    assert before.kv_written - after.kv_written == (2 * entry if policy == "noop" else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_counts(family: str, tied: bool) -> None:
    model = build("default", family, tied=tied)
    counts = parameter_counts(model)
    assert counts["backbone"] == backbone(family, tied).num_parameters()
    assert counts["total"] == model.num_parameters() == counts["backbone"] + counts["new"]
