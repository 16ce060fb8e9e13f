"""The kernel calls of decisions, known before they matter where that can be, and the end of a layer that all skip."""

from __future__ import annotations

from typing import Any

import torch

from fbs_rl.decode.gate_rows import span
from fbs_rl.decode.kernel_arguments import Call, Void, make_call
from fbs_rl.decode.program import WARPS
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.skip_path import SkipAdapter
from fbs_rl.types import GateInputs, KVPolicy

_DECISION_BYTES = 384  # DECISION_BYTES of kernels/block.cu


def write_decision(
    writer: StepWriter, layer: FBSLayer, behind: bool = False, held: bool = False
) -> None:
    """Who skips the block that is asked for here; nothing where no gate acts or no member may skip.

    behind: other calls have awaited the front already. held: a product's input is in the room still, for the next.
    """
    if decides(writer, layer):
        held_bytes = writer.held_bytes(writer.model.config.hidden_size) if held else 0
        writer.calls.append(_decision(writer, layer, behind, held_bytes))


def write_known_end(writer: StepWriter, layer: FBSLayer) -> None:
    """The next layer's h where it is known that all rows skip this one, and the decision of the layer's gate."""
    if not decides(writer, layer):
        write_skip_end(writer, layer)
        return
    call = _decision(writer, layer, True, 0)
    path = {
        "path": skip_path(writer, layer),
        "next_Bd": writer.entering(layer.index + 1),
        "ends": 1,
    }
    call.tell(**path)
    writer.calls.append(call)


def take_along(writer: StepWriter, layer: FBSLayer, product: Call) -> None:
    """Let a product take the layer's decision along, while weights arrive that it will need."""
    room_bytes = -(-product.room_bytes // 128) * 128
    call = _decision(writer, layer, True, room_bytes)
    told = bytearray(bytes(call.arguments).ljust(_DECISION_BYTES, b"\0"))
    decision = torch.frombuffer(told, dtype=torch.uint8).to(writer.tokens.token_B.device)
    product.arguments.decision = decision.data_ptr()
    product.held = (*product.held, decision, *call.held)
    product.room_bytes, product.sets = call.room_bytes, call.sets


def _decision(writer: StepWriter, layer: FBSLayer, behind: bool, held_bytes: int) -> Call:
    """held_bytes: of the room, which it leaves alone."""
    config, gates, buffers = writer.model.config, writer.gates, writer.layers
    index, gate = layer.index, layer.skip_gate
    assert gate is not None
    block, own = config.block_asked_at(index), index in writer.free and not writer.ahead
    leader = block.start
    mask = sum(1 << member - leader for member in block if member in writer.free)
    reads: dict[str, Any] = {}
    if gate.reads_residual:
        reads |= {
            "reduce_at": writer.fronts[index].place["reduce"],
            "reduce_width": gate.reduce.out_features,
            "eps": gate.reduce_norm.eps,
        }
    if gate.reads_preview:
        assert writer.previews is not None
        reads |= {
            "preview_width": gate.preview.out_features,
            "pooled_width": gate.preview.in_features,
            "pooled_B": writer.previews.pooled_BR,
            "entropy_B": writer.previews.entropy_B,
            "fresh": int(layer.paw is not None and not behind),
        }
    if index > 0 and config.gate_inputs != GateInputs.PREVIEW:
        reads |= _moved(writer, index - 1)
    if own:
        reads |= {"path": skip_path(writer, layer), "next_Bd": writer.entering(index + 1)}
    if writer.ahead:
        reads |= {"guess_LB": gates.guess_LB, "doubt_LB": gates.doubt_LB}
    later = next((rows for place, rows in writer.gate_rows.items() if place > index), None)
    if later is not None:
        reads |= {"later": later.weight_N, "later_bytes": later.weight_N.nbytes}
    front, weights = buffers.front(index), writer.gate_rows[index].weight_N
    call = make_call(
        "decide", held_bytes + gate_bytes(writer, layer), front=front, front_stride=front.stride(0), weights=weights,
        hidden_width=gate.hidden.out_features, clip=gate.clip, motion_B2=gates.motion_B2,
        sampled=int(writer.sampled), consensus=int(writer.together), tau_B=writer.bar_B(leader), seed_B2=gates.seed_B2,
        position_B=writer.tokens.position_B, leader=leader, members=len(block), free_mask=mask,
        skip_LB=gates.skip_LB, stay_LB=gates.stay_LB, layers=config.layer_count, step=writer.tokens.step,
        trace_steps=len(gates.prob_TLB), prob_trace=gates.prob_TLB, skip_trace=gates.skip_TLB, held_bytes=held_bytes,
        behind=int(behind), **reads,
    )  # fmt: skip
    noted = (gates.skip_LB, gates.stay_LB, gates.guess_LB, gates.doubt_LB)
    call.quiet, call.sets = True, tuple(flags_LB[leader] for flags_LB in noted)
    if own and (asks_with_entry(writer, layer) or config.kv_on_skip == KVPolicy.NOOP):
        # Where all rows skip, nothing follows that others would wait for.
        call.quiet_flags, call.quiet_where = writer.skip_B(index), Void.SOME_ROW_RUNS
    return call


def decides(writer: StepWriter, layer: FBSLayer) -> bool:
    """Whether a gate is asked at this layer that somebody listens to."""
    block = writer.model.config.block_asked_at(layer.index)
    return layer.skip_gate is not None and not writer.free.isdisjoint(block)


def asks_with_entry(writer: StepWriter, layer: FBSLayer) -> bool:
    """Whether keys and values are made with the front, before the gate decides: they are needed either way, and the
    same, where nothing is injected. Then queries and attention need not wait for the decision either."""
    plain = layer.paw is None and layer.chunk_reader is None
    asks = (
        layer.skip_gate is not None and layer.index in writer.free and layer.index in writer.fronts
    )
    projects = writer.model.config.kv_on_skip == KVPolicy.PROJECT
    return plain and asks and projects and not writer.ahead


def skip_path(writer: StepWriter, layer: FBSLayer) -> dict[str, Any]:
    """SkipPath of kernels/skip_path.cu."""
    state, path = writer.entering(layer.index), layer.skip_path
    told = {"state_Bd": state, "width": state.shape[1]}
    if layer.index not in writer.free or not isinstance(path, SkipAdapter):
        return told
    down = writer.front(layer.index, "adapter")
    return told | {
        "up": path.up.weight, "rank": path.up.in_features, "down": down, "down_stride": down.stride(0),
    }  # fmt: skip


def write_skip_end(writer: StepWriter, layer: FBSLayer) -> Call:
    """The next layer's h where all rows skip this one."""
    call = writer.call(
        "skip_end", path_bytes(writer, layer), path=skip_path(writer, layer), out_Bd=writer.entering(layer.index + 1)
    )  # fmt: skip
    call.void_flags, call.void_where = writer.skip_B(layer.index), Void.SOME_ROW_RUNS
    return call


def write_move(writer: StepWriter, layer: FBSLayer) -> None:
    """Note how the layer in front moved the rows, for a later gate: where none is asked here, which would, and this
    layer may be skipped without that one."""
    index, config = layer.index, writer.model.config
    together = index - 1 in writer.free and index % config.gate_block > 0
    last = max(writer.gate_rows, default=-1)
    if index == 0 or index not in writer.free or together or index > last:
        return
    if config.gate_inputs != GateInputs.PREVIEW and not decides(writer, layer):
        moved = _moved(writer, index - 1)
        writer.call("move", motion_B2=writer.gates.motion_B2, **moved)


def _moved(writer: StepWriter, layer: int) -> dict[str, Any]:
    """What tells how `layer` moved the rows that ran it, while its two states are still there."""
    return {
        "before_Bd": writer.entering(layer),
        "after_Bd": writer.entering(layer + 1),
        "left_skip_B": writer.skip_B(layer),
        "width": writer.model.config.hidden_size,
    }


def gate_bytes(writer: StepWriter, layer: FBSLayer) -> int:
    """Of GateRoom in kernels/gate.cu."""
    gate, rows = layer.skip_gate, writer.shape.rows
    assert gate is not None
    reduced = gate.reduce.out_features if gate.reads_residual else 0
    floats = rows * (span(gate.hidden.in_features - reduced) + WARPS)
    numbers = rows * span(reduced) if rows > 1 else 0
    return 4 * floats + numbers * (16 // writer.shape.lane_numbers) + path_bytes(writer, layer)


def path_bytes(writer: StepWriter, layer: FBSLayer) -> int:
    """Of PathRoom in kernels/skip_path.cu."""
    path = layer.skip_path
    rank = path.up.in_features if isinstance(path, SkipAdapter) else 0
    columns = -(-writer.model.config.hidden_size // writer.multiprocessors)
    return 16 * -(-writer.shape.rows * rank // 4) + columns * rank * (
        16 // writer.shape.lane_numbers
    )
