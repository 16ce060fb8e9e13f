"""The parallel pass: all tokens of a sequence through all layers. In float32 it is the referee of every engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from fbs_rl.model.attention import sequence_mask
from fbs_rl.model.chunk_head import Segmentation, close_probability, segment
from fbs_rl.model.compiled import compiling
from fbs_rl.model.decision import Decider
from fbs_rl.model.document_attention import document_blocks
from fbs_rl.model.gated_layer import LayerPass, pass_layer, pass_layer_in_blocks
from fbs_rl.model.kv_cache import ChunkState, FBSCache, ReaderChunks, open_chunk_sum
from fbs_rl.model.layer import FBSLayer, Rope, unit_norm
from fbs_rl.model.preview import Glance
from fbs_rl.model.skip_gate import Motion
from fbs_rl.types import ChunkTap, KVPolicy, PassTaps, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel


@dataclass(slots=True)
class Tokens:
    """The tokens of one call: embeddings and where they stand. valid_BT, document_BT: None when trivial."""

    state_BTd: Tensor
    position_BT: Tensor
    rope: Rope
    valid_BT: Tensor | None = None
    document_BT: Tensor | None = None
    keep_states: bool = False


@dataclass(slots=True)
class PassResult:
    """state_BTd: before the final norm. The rest as in FBSOutput."""

    state_BTd: Tensor
    prob_LBT: Tensor
    skip_LBT: Tensor
    taps: PassTaps


@dataclass(slots=True)
class _Walk:
    """What travels from layer to layer beside the state."""

    motion_BT2: Tensor
    glance: Glance | None = None
    segmentation: Segmentation | None = None
    logit_BT: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)
    soft: list[Tensor] = field(default_factory=list)
    miss: list[Tensor] = field(default_factory=list)


def run_sequence(
    model: FBSModel,
    tokens: Tokens,
    decider: Decider,
    window_temperature: float | Tensor,
    cache: FBSCache | None = None,
) -> PassResult:
    """Run whole sequences; with `cache` (of prompts, where nothing skips) leave it ready for decoding."""
    state = tokens.state_BTd
    batch, length = tokens.position_BT.shape
    if compiling():  # a number would be compiled in, and it changes from step to step
        window_temperature = torch.full((), float(window_temperature), device=state.device)
    walk = _Walk(Motion.still(batch, length, state.device))
    taps = PassTaps(gated_BT=decider.gated_BT, valid_BT=tokens.valid_BT)
    plain_mask: Tensor | BlockMask | None
    passes = pass_layer
    if _in_blocks(model, tokens):
        assert tokens.document_BT is not None
        plain_mask, passes = document_blocks(tokens.document_BT), pass_layer_in_blocks
    else:
        plain_mask = sequence_mask(length, state.device, tokens.valid_BT, tokens.document_BT)
    normed = unit_norm(state, model.config.rms_norm_eps)
    saves = model.gradient_checkpointing and model.training and torch.is_grad_enabled()
    for layer in model.fbs_layers():
        if tokens.keep_states:
            taps.states.append(state)
        injected = _look(model, layer, state, normed, tokens, walk, taps, window_temperature, cache)
        arguments = (
            layer, state, normed, injected, decider.verdict(layer.index), walk.logit_BT, walk.motion_BT2,
            walk.glance, tokens.rope, plain_mask,
        )  # fmt: skip
        made: Any = (
            checkpoint(passes, *arguments, use_reentrant=False) if saves else passes(*arguments)
        )
        _keep(walk, made)
        if cache is not None:
            cache.layers[layer.index].append(made.key, made.value, tokens.valid_BT)
        state, normed = made.state_BTd, made.normed_BTd
    taps.final_state_BTd = state
    taps.soft_skip_LBT = torch.stack(walk.soft)
    taps.miss_ABT = torch.stack(walk.miss) if walk.miss else None
    return PassResult(state, torch.stack(walk.prob), torch.stack(walk.skip), taps)


def _in_blocks(model: FBSModel, tokens: Tokens) -> bool:
    """Whether attention goes block by block: where compiled code runs on packed documents and no key is ever absent."""
    wanted = model.document_attention == "blocks" and compiling() and tokens.state_BTd.is_cuda
    return wanted and tokens.document_BT is not None and model.config.kv_on_skip == KVPolicy.PROJECT


def _look(
    model: FBSModel, layer: FBSLayer, state: Tensor, normed: Tensor, tokens: Tokens, walk: _Walk, taps: PassTaps,
    window_temperature: float | Tensor, cache: FBSCache | None,
) -> Tensor:  # fmt: skip
    """h̃: the state with what PAW and the Chunk-Head add at this layer (the state itself if neither does)."""
    injected = state
    if layer.paw is not None:
        walk.glance = look_ahead(model, layer, normed, walk.glance, taps, window_temperature)
        injected = layer.paw.inject(injected, walk.glance.pooled_BTE)
    if layer.index == model.config.boundary_layer:
        _segment(model, normed, tokens, walk, taps, cache)
    if layer.chunk_reader is not None:
        assert walk.segmentation is not None and taps.chunks is not None
        addition, summaries = layer.chunk_reader.read_sequence(normed, walk.segmentation)
        injected = injected + addition
        taps.chunks.summaries[layer.index] = summaries
        if cache is not None and cache.chunks is not None:
            cache.chunks.readers[layer.index] = _reader_chunks(
                layer, normed, walk.segmentation, summaries, cache.poison
            )
    return injected


def look_ahead(
    model: FBSModel, layer: FBSLayer, normed: Tensor, earlier: Glance | None, taps: PassTaps,
    window_temperature: float | Tensor,
) -> Glance:  # fmt: skip
    """What a PAW layer sees. earlier: what the PAW layer before it saw, whose shortlist stays in use."""
    assert layer.paw is not None and model.preview is not None
    query = layer.paw.query(normed, model.preview)
    shortlist = None if earlier is None else earlier.shortlist
    if shortlist is None:
        shortlist = model.preview.shortlist(query, model.embed_tokens.weight)
    glance = layer.paw(normed, query, model.preview, shortlist, window_temperature)
    taps.previews.append(
        PreviewTap(layer.index, glance.query_BTR, glance.window_BT, glance.inclusion_BTK)
    )
    return glance


def _segment(
    model: FBSModel,
    normed: Tensor,
    tokens: Tokens,
    walk: _Walk,
    taps: PassTaps,
    cache: FBSCache | None,
) -> None:
    assert model.boundary is not None
    logits, blank = model.boundary(normed)
    walk.segmentation = segment(logits, tokens.valid_BT, tokens.document_BT)
    taps.chunks = ChunkTap(
        logits,
        blank,
        close_probability(logits),
        walk.segmentation.opens_BT,
        walk.segmentation.chunk_id_BT,
    )
    if cache is not None:
        cache.chunks = ChunkState.after_prompt(walk.segmentation, logits.argmax(-1))


def _reader_chunks(
    layer: FBSLayer, normed: Tensor, segmentation: Segmentation, summaries_BNW: Tensor, poison: bool
) -> ReaderChunks:
    """The ring of closed chunks after a prompt: chunk j at slot j mod cap, the newest `cap` kept."""
    reader = layer.chunk_reader
    assert reader is not None
    closed_B1 = segmentation.chunk_id_BT.amax(1, keepdim=True).clamp_min(0)
    slot_C = torch.arange(reader.cap, device=normed.device)
    newest_BC = closed_B1 - 1 - (closed_B1 - 1 - slot_C) % reader.cap
    there_BC1, index_BC1 = (newest_BC >= 0).unsqueeze(-1), newest_BC.clamp_min(0).unsqueeze(-1)
    fill = float("nan") if poison else 0.0
    key_BCW, value_BCW = (
        torch.where(there_BC1, made.gather(1, index_BC1.expand(-1, -1, made.shape[-1])), fill)
        for made in (reader.key(summaries_BNW), reader.value(summaries_BNW))
    )
    return ReaderChunks(key_BCW, value_BCW, open_chunk_sum(normed, segmentation))


def _keep(walk: _Walk, made: LayerPass) -> None:
    """What the next layer and the result need of a layer."""
    walk.motion_BT2, walk.logit_BT = made.motion_BT2, made.logit_BT
    walk.prob.append(made.prob_BT)
    walk.skip.append(made.skip_BT)
    walk.soft.append(made.soft_BT)
    if made.miss_BT is not None:
        walk.miss.append(made.miss_BT)
