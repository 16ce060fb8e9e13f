"""One decoding step with a cache, in which a skipped layer is really not run.

A layer that all rows skip is not entered; where some rows skip, theirs are dropped from the layer's
products. Where many rows share a GPU, which would wait for the host at each layer, they can be masked
instead (SkippingRows). Decisions, injections and skip paths are the functions of the parallel pass on [B, 1] tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbs_rl.model.attention import attend_step
from fbs_rl.model.chunk_head import ChunkReader, bias_columns, close_probability
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.decision import Decider
from fbs_rl.model.kv_cache import ChunkState, FBSCache, ReaderChunks
from fbs_rl.model.layer import FBSLayer, Rope, unit_norm
from fbs_rl.model.preview import Glance
from fbs_rl.model.sequence_pass import PassResult, Tokens, look_ahead
from fbs_rl.model.skip_gate import Motion
from fbs_rl.types import (
    B_LABEL,
    I_LABEL,
    ChunkTap,
    GateMode,
    KVPolicy,
    PassTaps,
    SkippingRows,
)

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel


@dataclass(slots=True)
class _Chunks:
    """What the chunk layers of one step share.

    used: slots of their rings that any row may have written. column_B1C: of the null slot and these, as in
    bias_columns. written_BC1: which of them a row has written (None: all). finished_F: rows whose open
    chunk closes, with its slot_F and size_F1; or all rows, and closing_F1 says which. kept_B1: 0 where a new
    chunk begins, else 1.
    """

    used: int
    column_B1C: Tensor
    written_BC1: Tensor | None
    finished_F: Tensor
    slot_F: Tensor
    size_F1: Tensor
    kept_B1: Tensor
    closing_F1: Tensor | None = None


@dataclass(slots=True)
class _Step:
    """What travels from layer to layer of one step. Its motion is worked out when a gate asks for it."""

    motion_B12: Tensor
    none_B1: Tensor  # z of a layer that nobody can skip, and its probability
    never_B1: Tensor
    gates_act: bool  # a dense step, the baseline of every comparison, computes no gate
    skipping: SkippingRows
    moved: tuple[Tensor, Tensor] | None = None  # states around a layer, not yet in motion_B12
    glance: Glance | None = None
    chunks: _Chunks | None = None
    prob_B1: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)

    def motion(self) -> Tensor:
        if self.moved is not None:
            self.motion_B12, self.moved = Motion.between(*self.moved), None
        return self.motion_B12


def run_step(
    model: FBSModel, tokens: Tokens, decider: Decider, window_temperature: float, cache: FBSCache,
    skipping: SkippingRows = SkippingRows.DROPPED,
) -> PassResult:  # fmt: skip
    """Feed one token a row (tokens hold [B, 1]) and extend the cache by it."""
    state = tokens.state_BTd
    batch = state.shape[0]
    gates_act = decider.request.mode in (GateMode.THRESHOLD, GateMode.SAMPLE)
    none_B1 = torch.zeros_like(decider.gated_BT)
    still = Motion.still(batch, 1, state.device)
    step = _Step(still, none_B1, none_B1.float(), gates_act, skipping)
    passes = _pass_masked if skipping is SkippingRows.MASKED else _pass_layer
    taps = PassTaps(gated_BT=decider.gated_BT, valid_BT=tokens.valid_BT)
    for layer in model.fbs_layers():
        normed = unit_norm(state, model.config.rms_norm_eps)
        _look(model, layer, normed, tokens, step, taps, window_temperature, cache)
        skip = _decide(layer, normed, decider, step)
        state = passes(model, layer, state, normed, skip, tokens, step, cache)
        if layer.chunk_reader is not None:
            _extend_chunks(
                layer.chunk_reader,
                normed,
                tokens.valid_BT,
                step.chunks,
                _ring(layer, normed, cache),
            )
    taps.final_state_BTd = state
    return PassResult(state, torch.stack(step.prob), torch.stack(step.skip), taps)


def _look(
    model: FBSModel, layer: FBSLayer, normed: Tensor, tokens: Tokens, step: _Step, taps: PassTaps,
    window_temperature: float, cache: FBSCache,
) -> None:  # fmt: skip
    """Preview and boundary: they run whether or not the layer is skipped."""
    if layer.paw is not None:
        step.glance = look_ahead(model, layer, normed, step.glance, taps, window_temperature)
    if layer.index == model.config.boundary_layer:
        assert model.boundary is not None
        logits, blank = model.boundary(normed)
        chunks = cache.chunk_state(normed.shape[0], normed.device)
        before_B1 = chunks.closed_B.unsqueeze(1)
        closes_B = _closes(chunks, logits[:, 0].argmax(-1), tokens.valid_BT)
        if step.skipping is SkippingRows.MASKED:
            step.chunks = _plan_masked_chunks(model.config, cache, chunks, closes_B)
        else:
            step.chunks = _plan_chunks(model.config, chunks, closes_B)
        _advance_chunks(chunks, closes_B, tokens.valid_BT)
        taps.chunks = ChunkTap(
            logits, blank, close_probability(logits), closes_B.unsqueeze(1), before_B1
        )


def _decide(layer: FBSLayer, normed: Tensor, decider: Decider, step: _Step) -> Tensor | None:
    """z [B] of this layer, None if nobody can skip it."""
    verdict, known_B1 = decider.verdict(layer.index), step.prob_B1
    if verdict.asks:
        gate = layer.skip_gate if step.gates_act else None
        step.prob_B1 = (
            None if gate is None else torch.sigmoid(gate(normed, step.motion(), step.glance))
        )
    decided_B1 = known_B1 if verdict.ahead else step.prob_B1
    skip_B1 = verdict.skip(decided_B1)
    prob_B1 = None if verdict.protected else decided_B1
    step.prob.append(step.never_B1 if prob_B1 is None else prob_B1)
    step.skip.append(step.none_B1 if skip_B1 is None else skip_B1)
    return None if skip_B1 is None else skip_B1[:, 0]


def _pass_layer(
    model: FBSModel, layer: FBSLayer, state: Tensor, normed: Tensor, skip_B: Tensor | None, tokens: Tokens,
    step: _Step, cache: FBSCache,
) -> Tensor:  # fmt: skip
    """The layer for the rows that run it, the skip path for the rest."""
    skipping = 0 if skip_B is None else sum(skip_B.tolist())
    if skipping == 0:
        executed = _execute(layer, state, normed, None, None, tokens, step, cache)
        step.moved = (state, executed)
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
        step.motion_B12 = step.motion().index_copy(0, run_rows, moved)
    return result


def _pass_masked(
    model: FBSModel, layer: FBSLayer, state: Tensor, normed: Tensor, skip_B: Tensor | None, tokens: Tokens,
    step: _Step, cache: FBSCache,
) -> Tensor:  # fmt: skip
    """The layer for all rows and the skip path for all rows, of which each row takes its own."""
    injected = _inject(layer, state, normed, None, step, cache)
    normed_in = layer.input_norm(injected, state, normed)
    key_in, exists = normed_in, tokens.valid_BT
    skip_B11 = None if skip_B is None else skip_B.view(-1, 1, 1)
    if skip_B11 is not None and injected is not state:
        key_in = torch.where(skip_B11, layer.input_norm(state, state, normed), normed_in)
    if skip_B11 is not None and model.config.kv_on_skip == KVPolicy.NOOP:
        ran = ~skip_B11[:, 0]
        exists = ran if exists is None else ran & exists
    kv = cache.layers[layer.index]
    kv.append(*_blanked(*layer.keys_values(key_in, tokens.rope), tokens.valid_BT), exists)
    query = layer.queries(normed_in, tokens.rope)[:, :, 0]
    attended = attend_step(query, *kv.view(), layer.self_attn.scaling).unsqueeze(1)
    executed = layer.finish(injected, attended)
    if skip_B11 is None:
        step.moved = (state, executed)
        return executed
    if step.gates_act:
        moved = Motion.between(state, executed)
        step.motion_B12 = torch.where(skip_B11, step.motion(), moved)
    return torch.where(skip_B11, layer.skip_path(state, normed), executed)


def _inject(
    layer: FBSLayer, rows_state: Tensor, normed: Tensor, rows: Tensor | None, step: _Step, cache: FBSCache
) -> Tensor:  # fmt: skip
    """h̃ of these rows (None: all); rows_state, their h, itself where nothing is added."""
    injected = rows_state
    if layer.paw is not None:
        assert step.glance is not None
        injected = layer.paw.inject(injected, _rows(step.glance.pooled_BTE, rows))
    if layer.chunk_reader is not None:
        ring = _ring(layer, normed, cache)
        injected = injected + _read_chunks(layer.chunk_reader, normed, step.chunks, ring, rows)
    return injected


def _execute(
    layer: FBSLayer, state: Tensor, normed: Tensor, run_rows: Tensor | None, project_rows: Tensor | None,
    tokens: Tokens, step: _Step, cache: FBSCache,
) -> Tensor:  # fmt: skip
    """Output of the rows in run_rows (None: all), and the layer's new cache column.

    project_rows: skipped rows that still write keys and values, computed from their state h.
    """
    batch = state.shape[0]
    rows_state = _rows(state, run_rows)
    injected = _inject(layer, rows_state, normed, run_rows, step, cache)
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


def _scatter(rows_tensor: Tensor, rows: Tensor, batch: int) -> Tensor:
    return rows_tensor.new_zeros(batch, *rows_tensor.shape[1:]).index_copy(0, rows, rows_tensor)


def _closes(chunks: ChunkState, label_B: Tensor, valid_B1: Tensor | None) -> Tensor:
    """Where this token closes the open chunk, or would if there were one, and opens the next."""
    closes_B = (label_B != I_LABEL) | ~chunks.continuable_B
    if valid_B1 is not None:
        closes_B = closes_B & valid_B1[:, 0]
    chunks.continuable_B = torch.where(closes_B, label_B == B_LABEL, chunks.continuable_B)
    return closes_B


def _plan_chunks(config: FBSConfig, chunks: ChunkState, closes_B: Tensor) -> _Chunks:
    counts = chunks.closed_B.tolist()
    used = min(max(counts), config.chunk_cache)
    slot_C = torch.arange(used, device=closes_B.device)
    closed_B11 = chunks.closed_B.view(-1, 1, 1)
    written_B1C = slot_C < closed_B11
    distance_B1C = (closed_B11 - 1 - slot_C) % config.chunk_cache
    finished_F = (closes_B & (chunks.open_size_B > 0)).nonzero()[:, 0]
    return _Chunks(
        used,
        bias_columns(distance_B1C, written_B1C, config.chunk_distance_buckets, config.chunk_cache),
        written_B1C.transpose(1, 2) if min(counts) < used else None,
        finished_F,
        chunks.closed_B[finished_F] % config.chunk_cache,
        chunks.open_size_B[finished_F].unsqueeze(-1),
        (~closes_B).float().unsqueeze(-1),
    )


def _plan_masked_chunks(
    config: FBSConfig, cache: FBSCache, chunks: ChunkState, closes_B: Tensor
) -> _Chunks:
    """The plan without a look at the device: slots that may be written, and all rows, some of which close a chunk."""
    used = min(cache.columns, config.chunk_cache)
    slot_C = torch.arange(used, device=closes_B.device)
    closed_B11 = chunks.closed_B.view(-1, 1, 1)
    written_B1C = slot_C < closed_B11
    distance_B1C = (closed_B11 - 1 - slot_C) % config.chunk_cache
    return _Chunks(
        used,
        bias_columns(distance_B1C, written_B1C, config.chunk_distance_buckets, config.chunk_cache),
        written_B1C.transpose(1, 2),
        torch.arange(len(closes_B), device=closes_B.device),
        chunks.closed_B % config.chunk_cache,
        chunks.open_size_B.clamp_min(1).unsqueeze(-1),
        (~closes_B).float().unsqueeze(-1),
        (closes_B & (chunks.open_size_B > 0)).unsqueeze(-1),
    )


def _advance_chunks(chunks: ChunkState, closes_B: Tensor, valid_B1: Tensor | None) -> None:
    """Count the chunk that this token closes and the token itself."""
    chunks.closed_B = chunks.closed_B + (closes_B & (chunks.open_size_B > 0))
    grown = torch.where(closes_B, 0, chunks.open_size_B) + 1
    chunks.open_size_B = (
        grown if valid_B1 is None else torch.where(valid_B1[:, 0], grown, chunks.open_size_B)
    )


def _ring(layer: FBSLayer, normed: Tensor, cache: FBSCache) -> ReaderChunks:
    assert layer.chunk_reader is not None
    return cache.ring(layer.index, layer.chunk_reader, normed[:, 0])


def _read_chunks(
    reader: ChunkReader, normed: Tensor, chunks: _Chunks | None, ring: ReaderChunks, rows: Tensor | None
) -> Tensor:  # fmt: skip
    """The addition to h̃, of these rows (None: all), from the chunks closed before this token."""
    assert chunks is not None
    key, value = ring.key_BCW[:, : chunks.used], ring.value_BCW[:, : chunks.used]
    if chunks.written_BC1 is not None:  # slots that a row has not written hold anything
        key, value = (torch.where(chunks.written_BC1, x, 0.0) for x in (key, value))
    key, value, column = (_rows(x, rows) for x in (key, value, chunks.column_B1C))
    return reader.attend(_rows(normed, rows), key, value, column)


def _extend_chunks(
    reader: ChunkReader, normed: Tensor, valid_B1: Tensor | None, chunks: _Chunks | None, ring: ReaderChunks
) -> None:  # fmt: skip
    """Close the open chunk of the rows that close it, then add this token to the (new) open chunk."""
    assert chunks is not None
    rows, slot = chunks.finished_F, chunks.slot_F
    if len(rows):
        summary = reader.summarise((ring.open_sum_Bd[rows] / chunks.size_F1).to(normed.dtype))
        for held_BCW, made in (
            (ring.key_BCW, reader.key(summary)),
            (ring.value_BCW, reader.value(summary)),
        ):
            if chunks.closing_F1 is not None:
                made = torch.where(chunks.closing_F1, made, held_BCW[rows, slot])
            held_BCW[rows, slot] = made
    added = normed[:, 0].float()
    if valid_B1 is not None:
        added = torch.where(valid_B1, added, 0.0)
    ring.open_sum_Bd = torch.addcmul(added, ring.open_sum_Bd, chunks.kept_B1)
