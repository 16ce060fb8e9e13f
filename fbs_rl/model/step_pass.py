"""One decoding step with a cache, in which a skipped layer is really not run.

A layer that all rows skip is not entered; where some rows skip, theirs are dropped from the layer's
products. Decisions, injections and skip paths are the functions of the parallel pass on [B, 1] tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbs_rl.model.attention import attend_step
from fbs_rl.model.chunk_head import ChunkReader, close_probability
from fbs_rl.model.decision import Decider
from fbs_rl.model.kv_cache import ChunkState, FBSCache, ReaderChunks
from fbs_rl.model.layer import FBSLayer, Rope, unit_norm
from fbs_rl.model.preview import Glance, Shortlist
from fbs_rl.model.sequence_pass import PassResult, Tokens
from fbs_rl.model.skip_gate import Motion
from fbs_rl.types import B_LABEL, I_LABEL, ChunkTap, GateMode, KVPolicy, PassTaps, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel


@dataclass(slots=True)
class _Step:
    """What travels from layer to layer of one step."""

    motion_B12: Tensor
    none_B1: Tensor  # z of a layer that nobody can skip
    gates_act: bool  # a dense step, the baseline of every comparison, computes no gate
    shortlist: Shortlist | None = None
    glance: Glance | None = None
    closes_B: Tensor | None = None
    prob_B1: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)


def run_step(
    model: FBSModel, tokens: Tokens, decider: Decider, window_temperature: float, cache: FBSCache
) -> PassResult:
    """Feed one token a row (tokens hold [B, 1]) and extend the cache by it."""
    state = tokens.state_BTd
    batch = state.shape[0]
    gates_act = decider.request.mode in (GateMode.THRESHOLD, GateMode.SAMPLE)
    none_B1 = torch.zeros_like(decider.gated_BT)
    step = _Step(Motion.still(batch, 1, state.device), none_B1, gates_act)
    taps = PassTaps(gated_BT=decider.gated_BT, valid_BT=tokens.valid_BT)
    for layer in model.fbs_layers():
        normed = unit_norm(state, model.config.rms_norm_eps)
        _look(model, layer, normed, tokens, step, taps, window_temperature, cache)
        skip = _decide(layer, normed, decider, step)
        state = _pass_layer(model, layer, state, normed, skip, tokens, step, cache)
        if layer.chunk_reader is not None:
            _extend_chunks(layer.chunk_reader, normed, tokens.valid_BT, step, cache, layer.index)
    _advance_chunks(tokens.valid_BT, step, cache)
    taps.final_state_BTd = state
    return PassResult(state, torch.stack(step.prob), torch.stack(step.skip), taps)


def _look(
    model: FBSModel, layer: FBSLayer, normed: Tensor, tokens: Tokens, step: _Step, taps: PassTaps,
    window_temperature: float, cache: FBSCache,
) -> None:  # fmt: skip
    """Preview and boundary: they run whether or not the layer is skipped."""
    if layer.paw is not None:
        assert model.preview is not None
        query = layer.paw.query(normed, model.preview)
        if step.shortlist is None:
            step.shortlist = model.preview.shortlist(query, model.embed_tokens.weight)
        glance = layer.paw(normed, query, model.preview, step.shortlist, window_temperature)
        step.glance = glance
        taps.previews.append(
            PreviewTap(layer.index, glance.query_BTR, glance.window_BT, glance.inclusion_BTK)
        )
    if layer.index == model.config.boundary_layer:
        assert model.boundary is not None
        logits, blank = model.boundary(normed)
        if cache.chunks is None:
            cache.chunks = ChunkState.empty(normed.shape[0], normed.device)
        label_B = logits[:, 0].argmax(-1)
        continues_B = (label_B == I_LABEL) & cache.chunks.continuable_B
        closes_B = ~continues_B if tokens.valid_BT is None else ~continues_B & tokens.valid_BT[:, 0]
        cache.chunks.continuable_B = torch.where(
            closes_B, label_B == B_LABEL, cache.chunks.continuable_B
        )
        step.closes_B = closes_B
        taps.chunks = ChunkTap(
            logits,
            blank,
            close_probability(logits),
            closes_B.unsqueeze(1),
            cache.chunks.closed_B.unsqueeze(1),
        )


def _decide(layer: FBSLayer, normed: Tensor, decider: Decider, step: _Step) -> Tensor | None:
    """z [B] of this layer, None if nobody can skip it."""
    if decider.leads(layer.index):
        gate = layer.skip_gate if step.gates_act else None
        step.prob_B1 = (
            None if gate is None else torch.sigmoid(gate(normed, step.motion_B12, step.glance))
        )
    skip_B1 = decider.skip(layer.index, step.prob_B1)
    prob_B1 = None if layer.index in decider.forced else step.prob_B1
    step.prob.append(step.none_B1.float() if prob_B1 is None else prob_B1)
    step.skip.append(step.none_B1 if skip_B1 is None else skip_B1)
    return None if skip_B1 is None else skip_B1[:, 0]


def _pass_layer(
    model: FBSModel, layer: FBSLayer, state: Tensor, normed: Tensor, skip_B: Tensor | None, tokens: Tokens,
    step: _Step, cache: FBSCache,
) -> Tensor:  # fmt: skip
    """The layer for the rows that run it, the skip path for the rest."""
    skipping = 0 if skip_B is None else int(skip_B.sum())
    if skipping == 0:
        executed = _execute(layer, state, normed, None, None, tokens, step, cache)
        if step.gates_act:
            step.motion_B12 = Motion.between(state, executed)
        return executed
    assert skip_B is not None
    projects = model.config.kv_on_skip == KVPolicy.PROJECT
    if skipping == len(skip_B):
        if projects:
            key, value = layer.keys_values(layer.input_norm(state, state, normed), tokens.rope)
            cache.layers[layer.index].append(
                *_blanked(key, value, tokens.valid_BT), tokens.valid_BT
            )
        return layer.skip_path(state, normed)
    run_rows, skip_rows = (~skip_B).nonzero()[:, 0], skip_B.nonzero()[:, 0]
    executed = _execute(
        layer, state, normed, run_rows, skip_rows if projects else None, tokens, step, cache
    )
    result = state.index_copy(0, run_rows, executed)
    result = result.index_copy(0, skip_rows, layer.skip_path(state[skip_rows], normed[skip_rows]))
    if step.gates_act:
        moved = Motion.between(state[run_rows], executed)
        step.motion_B12 = step.motion_B12.index_copy(0, run_rows, moved)
    return result


def _execute(
    layer: FBSLayer, state: Tensor, normed: Tensor, run_rows: Tensor | None, project_rows: Tensor | None,
    tokens: Tokens, step: _Step, cache: FBSCache,
) -> Tensor:  # fmt: skip
    """Output of the rows in run_rows (None: all), and the layer's new cache column.

    project_rows: skipped rows that still write keys and values, computed from their state h.
    """
    batch = state.shape[0]
    rows_state = _rows(state, run_rows)
    injected = rows_state
    if layer.paw is not None:
        assert step.glance is not None
        injected = layer.paw.inject(injected, _glance_rows(step.glance, run_rows))
    if layer.chunk_reader is not None and cache.chunks is not None:
        injected = injected + _read_chunks(
            layer.chunk_reader, _rows(normed, run_rows), cache.chunks, layer.index, run_rows
        )
    normed_in = layer.input_norm(injected, rows_state, _rows(normed, run_rows))
    rope = _rope_rows(tokens.rope, run_rows)
    query = layer.queries(normed_in, rope)[:, :, 0]
    key, value = layer.keys_values(normed_in, rope)
    exists = tokens.valid_BT
    if run_rows is not None:
        key, value = _scatter(key, run_rows, batch), _scatter(value, run_rows, batch)
        query = _scatter(query, run_rows, batch)
        if project_rows is not None:
            idle_state, idle_normed = state[project_rows], normed[project_rows]
            late = layer.keys_values(
                layer.input_norm(idle_state, idle_state, idle_normed),
                _rope_rows(tokens.rope, project_rows),
            )
            key = key.index_copy(0, project_rows, late[0])
            value = value.index_copy(0, project_rows, late[1])
        else:
            ran = torch.zeros(batch, 1, dtype=torch.bool, device=state.device).index_fill_(
                0, run_rows, True
            )
            exists = ran if exists is None else ran & exists
    kv = cache.layers[layer.index]
    kv.append(*_blanked(key, value, tokens.valid_BT), exists)
    # Every row attends, though only run_rows are read: gathering their keys would copy the whole cache.
    attended = attend_step(query, *kv.view(), layer.self_attn.scaling).unsqueeze(1)
    return layer.finish(injected, _rows(attended, run_rows))


def _blanked(key: Tensor, value: Tensor, valid_B1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros where the row's token is padding: an absent entry must still be a number."""
    if valid_B1 is None:
        return key, value
    keep = valid_B1[:, :, None, None]
    return torch.where(keep, key, 0.0), torch.where(keep, value, 0.0)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _rope_rows(rope: Rope, rows: Tensor | None) -> Rope:
    return _rows(rope[0], rows), _rows(rope[1], rows)


def _glance_rows(glance: Glance, rows: Tensor | None) -> Glance:
    if rows is None:
        return glance
    return Glance(
        glance.pooled_BTE[rows],
        glance.entropy_BT,
        glance.window_BT,
        glance.inclusion_BTK,
        glance.query_BTR,
    )


def _scatter(rows_tensor: Tensor, rows: Tensor, batch: int) -> Tensor:
    return rows_tensor.new_zeros(batch, *rows_tensor.shape[1:]).index_copy(0, rows, rows_tensor)


def _read_chunks(
    reader: ChunkReader, normed: Tensor, chunks: ChunkState, layer: int, rows: Tensor | None
) -> Tensor:
    """The addition to h̃ from the chunks closed before this token."""
    closed_B1 = _rows(chunks.closed_B, rows).view(-1, 1, 1)
    ring = chunks.readers.get(layer)
    width = reader.key.out_features
    if ring is None:
        empty = normed.new_zeros(normed.shape[0], 0, width)
        nothing = torch.zeros(normed.shape[0], 1, 0, dtype=torch.long, device=normed.device)
        return reader.attend(normed, empty, empty, nothing, nothing.bool())
    counts = chunks.closed_B.tolist()
    used = min(max(counts), reader.cap)
    slot_C = torch.arange(used, device=normed.device)
    distance_B1C = (closed_B1 - 1 - slot_C) % reader.cap
    written_B1C = slot_C < closed_B1
    key, value = _rows(ring.key_BCW[:, :used], rows), _rows(ring.value_BCW[:, :used], rows)
    if min(counts) < used:  # slots that a row has not written hold anything
        keep_BC1 = written_B1C.transpose(1, 2)
        key, value = torch.where(keep_BC1, key, 0.0), torch.where(keep_BC1, value, 0.0)
    return reader.attend(normed, key, value, distance_B1C, written_B1C)


def _extend_chunks(
    reader: ChunkReader,
    normed: Tensor,
    valid_B1: Tensor | None,
    step: _Step,
    cache: FBSCache,
    layer: int,
) -> None:
    """Close the open chunk of the rows that close it, then add this token to the (new) open chunk."""
    chunks = cache.chunks
    assert chunks is not None and step.closes_B is not None
    if layer not in chunks.readers:
        blank = float("nan") if cache.poison else 0.0
        shape = (normed.shape[0], reader.cap, reader.key.out_features)
        chunks.readers[layer] = ReaderChunks(
            normed.new_full(shape, blank),
            normed.new_full(shape, blank),
            torch.zeros_like(normed[:, 0], dtype=torch.float32),
        )
    ring = chunks.readers[layer]
    closing = (step.closes_B & (chunks.open_size_B > 0)).nonzero()[:, 0]
    if len(closing):
        mean = ring.open_sum_Bd[closing] / chunks.open_size_B[closing].unsqueeze(-1)
        summary = reader.summarise(mean.to(normed.dtype))
        slot = chunks.closed_B[closing] % reader.cap
        ring.key_BCW[closing, slot] = reader.key(summary)
        ring.value_BCW[closing, slot] = reader.value(summary)
    kept = torch.where(step.closes_B.unsqueeze(-1), 0.0, ring.open_sum_Bd)
    added = normed[:, 0].float()
    ring.open_sum_Bd = kept + (added if valid_B1 is None else torch.where(valid_B1, added, 0.0))


def _advance_chunks(valid_B1: Tensor | None, step: _Step, cache: FBSCache) -> None:
    """Count the chunk that this token closed and the token itself, once all chunk layers have used the old counts."""
    chunks = cache.chunks
    if chunks is None or step.closes_B is None:
        return
    closed = step.closes_B & (chunks.open_size_B > 0)
    chunks.closed_B = chunks.closed_B + closed
    grown = torch.where(step.closes_B, 0, chunks.open_size_B) + 1
    chunks.open_size_B = (
        grown if valid_B1 is None else torch.where(valid_B1[:, 0], grown, chunks.open_size_B)
    )
