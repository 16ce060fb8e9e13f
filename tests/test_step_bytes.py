"""Bytes of a decoding step, and numbers of parameters, against the instantiated modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fbs_rl.model import FBSForCausalLM
from fbs_rl.model.flops import parameter_counts, step_bytes
from tests.cost_variants import CAP, FAMILIES, VARIANTS, build, of_every_shape
from tests.tiny import HIDDEN, LAYERS, backbone

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
