"""The kernel calls of one layer of the backbone, and of the step's two ends."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fbs_rl.decode.attention_calls import (
    write_guessed_attention,
    write_known_attention,
    write_mix,
)
from fbs_rl.decode.decision_calls import (
    asks_with_entry,
    decides,
    skip_path,
    take_along,
    write_decision,
    write_move,
    write_skip_end,
)
from fbs_rl.decode.front_rows import FrontRows
from fbs_rl.decode.kernel_arguments import Void
from fbs_rl.decode.module_calls import (
    write_boundary,
    write_chunks,
    write_injection,
    write_look,
)
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.layer import FBSLayer
from fbs_rl.types import KVPolicy


def write_step(writer: StepWriter) -> None:
    """A step from the token's embedding to the logits."""
    _write_embedding(writer)
    for layer in writer.model.model.fbs_layers():
        _write_modules(writer, layer)
        _write_layer(writer, layer)
    _write_logits(writer)


def _write_embedding(writer: StepWriter) -> None:
    table: Any = writer.model.model.embed_tokens.weight
    writer.call(
        "embed", table=table, token_B=writer.tokens.token_B, width=table.shape[1],
        state_Bd=writer.layers.state[0], motion_B2=writer.gates.motion_B2 if writer.free else None,
    )  # fmt: skip


def _write_modules(writer: StepWriter, layer: FBSLayer) -> None:
    """Everything that FBS does before the layer, up to h̃."""
    front, index = writer.fronts.get(layer.index), layer.index
    if asks_with_entry(writer, layer) or _is_known(writer, layer):
        return  # it does nothing else
    if front is not None:
        _write_front(writer, layer, front)
    if layer.paw is not None:
        write_look(writer, layer)
    if index == writer.model.config.boundary_layer:
        write_boundary(writer, layer)
    if not writer.ahead:
        write_move(writer, layer)
        write_decision(writer, layer)
    if layer.paw is not None:
        write_injection(writer, layer)
    if layer.chunk_reader is not None:
        write_chunks(writer, layer)


def _write_front(writer: StepWriter, layer: FBSLayer, front: FrontRows) -> None:
    index = layer.index
    # Inside a block of one decision all but the skip adapter's rows may be missing: they are for those who skip.
    follows = set(front.place) == {"adapter"}
    call = writer.product(
        "product_front", [front.weight_Fd], writer.entering(index), writer.layers.front(index),
        bias_N=front.bias_F, scale_N=front.scale_F, skip_B=writer.stay_B(index) if follows else None,
    )  # fmt: skip
    if follows and writer.shape.rows == 1:  # by flags that are known already
        call.void_flags, call.void_where = writer.skip_B(index), Void.SOME_ROW_RUNS
    elif follows:
        call.void_flags = writer.stay_B(index)


def _write_layer(writer: StepWriter, layer: FBSLayer) -> None:
    """From h̃ to the next layer's h; rows that skip take the skip path."""
    buffers, skip_B, state = writer.layers, writer.skip_B(layer.index), writer.entering(layer.index)
    adds = layer.paw is not None or layer.chunk_reader is not None
    injected = buffers.injected_Bd if adds else state
    if asks_with_entry(writer, layer):
        write_guessed_attention(writer, layer)
    elif _is_known(writer, layer):
        write_known_attention(writer, layer)
    else:
        if skip_B is not None and (writer.ahead or layer.skip_gate is None):
            # Keys and values of the token come behind it, for which all wait; without them nothing does.
            write_skip_end(writer, layer).quiet = writer.model.config.kv_on_skip == KVPolicy.PROJECT
        _write_attention(writer, layer, injected, skip_B)
        if writer.ahead and skip_B is not None:
            first = len(writer.calls)
            write_decision(writer, layer, behind=True)
            for call in writer.calls[first:]:
                call.void_flags, call.void_where = skip_B, Void.SOME_ROW_RUNS
    if writer.ahead:
        write_move(writer, layer)
    # Of flags that say the same these are the ones that calls in front were void by.
    void = writer.guess_B(layer.index) if _is_known(writer, layer) else skip_B
    first = len(writer.calls)
    _write_rest(writer, layer, injected, skip_B)
    for call in writer.calls[first:]:
        call.void_flags = void


def _write_rest(
    writer: StepWriter, layer: FBSLayer, injected: Tensor, skip_B: Tensor | None
) -> None:
    """What follows attention. A decision that is ahead of its layer hides best where most weights are read; that of
    several rows takes longer than rings hold weights for, so it goes where blocks wait for attention."""
    buffers, attention, mlp = writer.layers, layer.self_attn, cast(Any, layer.mlp)
    asks = writer.ahead and decides(writer, layer)
    if asks and not writer.takes_along:
        write_decision(writer, layer, behind=True)
    writer.product(
        "product_attention_out", [attention.o_proj.weight], buffers.attended_BX, buffers.middle_Bd,
        residual_Bd=injected, bias_N=attention.o_proj.bias, skip_B=skip_B,
    )  # fmt: skip
    gate_up = writer.product(
        "product_gate_up", [mlp.gate_proj.weight, mlp.up_proj.weight], buffers.middle_Bd, buffers.active_BI,
        norm=cast(Any, layer.post_attention_layernorm).weight, skip_B=skip_B,
    )  # fmt: skip
    if asks and writer.takes_along:
        take_along(writer, layer, gate_up)
    writer.product(
        "product_down", [mlp.down_proj.weight], buffers.active_BI, writer.entering(layer.index + 1),
        residual_Bd=buffers.middle_Bd, path=skip_path(writer, layer), skip_B=skip_B,
    )  # fmt: skip


def _is_known(writer: StepWriter, layer: FBSLayer) -> bool:
    """Whether attention can be written for what is known of a layer that adds nothing to its input."""
    adds = layer.paw is not None or layer.chunk_reader is not None
    reads = adds or layer.index == writer.model.config.boundary_layer
    return writer.ahead and layer.index in writer.fronts and not reads


def _write_attention(
    writer: StepWriter, layer: FBSLayer, injected: Tensor, skip_B: Tensor | None
) -> None:
    projects = writer.model.config.kv_on_skip == KVPolicy.PROJECT
    void = None if projects else skip_B
    _write_qkv(writer, layer, injected, skip_B)
    writer.calls[-1].void_flags = void
    mixed = write_mix(writer, layer, skip_B)
    if void is None and skip_B is not None:
        # All that is left where all rows skip is the token's entry, which this step does not read.
        mixed.quiet_flags = skip_B
    mixed.void_flags = void


def _write_qkv(
    writer: StepWriter, layer: FBSLayer, injected: Tensor, skip_B: Tensor | None
) -> None:
    buffers, attention = writer.layers, layer.self_attn
    projects = writer.model.config.kv_on_skip == KVPolicy.PROJECT
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    writer.product(
        "product_qkv", [part.weight for part in parts], injected, buffers.qkv(layer.index),
        norm=layer.input_layernorm.weight, skip_B=skip_B, bias_N=buffers.qkv_bias.get(layer.index),
        kept_from=attention.q_proj.out_features if projects else -1,
    )  # fmt: skip


def _write_logits(writer: StepWriter) -> None:
    tokens, model = writer.tokens, writer.model
    norm: Any = model.model.norm
    writer.product(
        "product_logits", [model.lm_head.weight], writer.entering(model.config.layer_count), tokens.logits_BV,
        norm=norm.weight, best=tokens.best, best_index=tokens.best_index,
    )  # fmt: skip


def write_advance(writer: StepWriter, picks: bool) -> None:
    """The step's last call: the token that is fed next, the position, the trace, and what the next token is taken to
    skip.

    picks: the best token; else what is in token_B by then.
    """
    tokens, gates = writer.tokens, writer.gates
    guesses: dict[str, Any] = {}
    if writer.free and not writer.ahead:
        guesses = {
            "skip_LB": gates.skip_LB,
            "guess_LB": gates.guess_LB,
            "doubt_LB": gates.doubt_LB,
            "layers": len(gates.skip_LB),
        }
    writer.call(
        "advance", 8 * writer.shape.rows, best=tokens.best, best_index=tokens.best_index,
        offers=len(tokens.best) if picks else 0,
        forced_steps=tokens.forced_steps, forced=tokens.forced_TB, token_B=tokens.token_B,
        vocabulary=tokens.logits_BV.shape[1],
        position_B=tokens.position_B, step=tokens.step, trace_steps=len(tokens.token_TB), token_trace=tokens.token_TB,
        **guesses,
    )  # fmt: skip
