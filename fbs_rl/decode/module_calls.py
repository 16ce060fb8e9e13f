"""The kernel calls of PAW, the Chunk-Head and the gates in one layer of a decoding step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fbs_rl.decode.gate_rows import span
from fbs_rl.decode.kernel_arguments import Void
from fbs_rl.decode.program import WARPS
from fbs_rl.decode.step_buffers import MOST_FOUND, PreviewBuffers
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.preview import Paw
from fbs_rl.model.skip_path import SkipAdapter
from fbs_rl.types import Compression, GateInputs, KVPolicy

# Keys, places, and a flag a thread: kernels/preview.cu.
_SHORTLIST_BYTES = 4 * (2 * MOST_FOUND + 256)
_BATCH = 8  # of kernels/pool.cu


def write_look(writer: StepWriter, layer: FBSLayer) -> None:
    """ṽ and H₁ of a PAW layer; at the first one of a step, the shortlist before them."""
    paw, head, buffers = layer.paw, writer.model.model.preview, writer.previews
    assert paw is not None and head is not None and buffers is not None
    first = layer.index == writer.model.config.preview_layers[0]
    if first:
        _write_shortlist(writer, layer, buffers)
    front, place = writer.layers.front(layer.index), writer.fronts[layer.index].place
    window: dict[str, Any] = {"fixed_window": float(paw.fixed_window or 0)}
    if paw.fixed_window is None:
        window = {
            "window_at": place["window"],
            "window_hidden": paw.window_in.out_features,
            "window_out": paw.window_out.weight,
            "window_bias": paw.window_out.bias,
            "fixed_window": -1.0,
        }
    rank, count = head.rank, head.shortlist_size
    # LookRoom of kernels/preview.cu
    table = count * (rank * (16 // writer.shape.lane_numbers) + 64)
    floats = 2 * rank + 2 * 32 * WARPS + 4 + (1 + WARPS) * count
    writer.call(
        "look", table + 4 * floats, front=front, front_stride=front.stride(0), hard=int(paw.hard),
        temperature=writer.model.config.paw_temperature, query_at=place["query"], maps_KRR=head.horizon_maps,
        index_BM=buffers.index_BM, table_NR=buffers.table_NR, early=int(not first), horizons=head.horizons,
        candidates=count, rank=rank, seen_BKR=buffers.seen_BKR, weight_BK=buffers.weight_BK,
        entropy_B=buffers.entropy_B, **window,
    )  # fmt: skip
    _write_pool(writer, paw, buffers.taps[layer.index], buffers)


def _write_shortlist(writer: StepWriter, layer: FBSLayer, buffers: PreviewBuffers) -> None:
    head = writer.model.model.preview
    assert head is not None
    front, place = writer.layers.front(layer.index), writer.fronts[layer.index].place
    count, blocks, rank = len(buffers.table_NR), writer.multiprocessors, head.rank
    writer.call(
        "scores", 4 * (2 * rank + -(-count // blocks)), front=front, front_stride=front.stride(0),
        query_at=place["query"], mean_map_RR=buffers.mean_map_RR, table_NR=buffers.table_NR,
        prior_N=buffers.prior_N, count=count, rank=rank, score_BN=buffers.score_BN, best=buffers.best,
    )  # fmt: skip
    writer.call(
        "shortlist", _SHORTLIST_BYTES, score_BN=buffers.score_BN, count=count,
        wanted=head.shortlist_size, index_BM=buffers.index_BM, best=buffers.best,
        offers=blocks, key_BF=buffers.key_BF, place_BF=buffers.place_BF,
        found_B=buffers.found_B, arrived_B=buffers.arrived_B,
    )  # fmt: skip


def _write_pool(writer: StepWriter, paw: Paw, taps: Tensor, buffers: PreviewBuffers) -> None:
    horizons, rank = buffers.seen_BKR.shape[1:]
    mixes, batches = paw.compression is Compression.CONV, -(-horizons // _BATCH)
    floats = (batches * _BATCH + 2 + batches) * rank + batches * _BATCH  # PoolRoom
    call = writer.call(
        "pool", 4 * floats + (taps.nbytes if mixes else 0), seen_BKR=buffers.seen_BKR,
        weight_BK=buffers.weight_BK, mix=taps if mixes else None, mix_bias=paw.mix.bias if mixes else None,
        horizons=horizons, rank=rank, pooled_BR=buffers.pooled_BR,
    )  # fmt: skip
    call.quiet = writer.shape.rows == 1  # every block makes the row by itself


def write_injection(writer: StepWriter, layer: FBSLayer) -> None:
    """h̃ = h + s·W_up·RMSNorm(ṽ); h where the row skips."""
    assert layer.paw is not None and writer.previews is not None
    eps = layer.paw.up_norm.eps
    writer.product(
        "product_inject_preview", [layer.paw.up.weight], writer.previews.pooled_BR, writer.layers.injected_Bd,
        norm=layer.paw.up_norm.weight, eps=eps, strength=layer.paw.strength,
        residual_Bd=writer.entering(layer.index), skip_B=writer.skip_B(layer.index),
    ).void_flags = _read_by_nobody(writer, layer)  # fmt: skip


def _read_by_nobody(writer: StepWriter, layer: FBSLayer) -> Tensor | None:
    """The layer's flags if nothing reads h̃ where all rows skip: without keys and values of skipped tokens."""
    return (
        None if writer.model.config.kv_on_skip == KVPolicy.PROJECT else writer.skip_B(layer.index)
    )


def write_decision(writer: StepWriter, layer: FBSLayer, behind: bool = False) -> None:
    """Who skips the block that begins here; nothing where no gate acts or no member may skip.

    behind: other calls have awaited the front already.
    """
    config, gates, buffers = writer.model.config, writer.gates, writer.layers
    index, gate = layer.index, layer.skip_gate
    end = min(index + config.gate_block, config.layer_count)
    mask = sum(1 << member - index for member in range(index, end) if member in writer.free)
    if gate is None or not mask:
        return
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
            "fresh": int(layer.paw is not None),
        }
    if index > 0 and config.gate_inputs != GateInputs.PREVIEW:
        reads |= _moved(writer, index - 1)
    if index in writer.free:
        reads |= {"path": skip_path(writer, layer), "next_Bd": writer.entering(index + 1)}
    later = next((rows for place, rows in writer.gate_rows.items() if place > index), None)
    if later is not None:
        reads |= {"later": later.weight_N, "later_bytes": later.weight_N.nbytes}
    front, weights = buffers.front(index), writer.gate_rows[index].weight_N
    asks = asks_with_entry(writer, layer)
    held = writer.held_bytes(config.hidden_size) if asks and not behind else 0
    call = writer.call(
        "decide", held + gate_bytes(writer, layer), front=front, front_stride=front.stride(0), weights=weights,
        hidden_width=gate.hidden.out_features, clip=gate.clip, motion_B2=gates.motion_B2,
        sampled=int(writer.sampled), consensus=int(writer.together), tau_B=gates.tau_B, seed_B2=gates.seed_B2,
        position_B=writer.tokens.position_B, leader=index, members=end - index, free_mask=mask,
        skip_LB=gates.skip_LB, stay_LB=gates.stay_LB, layers=config.layer_count, step=writer.tokens.step,
        trace_steps=len(gates.prob_TLB), prob_trace=gates.prob_TLB, skip_trace=gates.skip_TLB, held_bytes=held,
        behind=int(behind), **reads,
    )  # fmt: skip
    call.quiet, call.sets = True, (gates.skip_LB[index], gates.stay_LB[index])
    if index in writer.free and (asks or config.kv_on_skip == KVPolicy.NOOP):
        # Where all rows skip, nothing follows that others would wait for.
        call.quiet_flags, call.quiet_where = writer.skip_B(index), Void.SOME_ROW_RUNS


def asks_with_entry(writer: StepWriter, layer: FBSLayer) -> bool:
    """Whether keys and values are made with the front, before the gate decides: they are needed either way, and the
    same, where nothing is injected. Then queries and attention need not wait for the decision either."""
    plain = layer.paw is None and layer.chunk_reader is None
    asks = (
        layer.skip_gate is not None and layer.index in writer.free and layer.index in writer.fronts
    )
    return plain and asks and writer.model.config.kv_on_skip == KVPolicy.PROJECT


def skip_path(writer: StepWriter, layer: FBSLayer) -> dict[str, Any]:
    """SkipPath of kernels/products.cu."""
    state, path = writer.entering(layer.index), layer.skip_path
    told = {"state_Bd": state, "width": state.shape[1]}
    if layer.index not in writer.free or not isinstance(path, SkipAdapter):
        return told
    down = writer.front(layer.index, "adapter")
    return told | {
        "up": path.up.weight, "rank": path.up.in_features, "down": down, "down_stride": down.stride(0),
    }  # fmt: skip


def gate_bytes(writer: StepWriter, layer: FBSLayer) -> int:
    """Of GateRoom in kernels/gate.cu."""
    gate, rows, path = layer.skip_gate, writer.shape.rows, layer.skip_path
    assert gate is not None
    rank = path.up.in_features if isinstance(path, SkipAdapter) else 0
    reduced = gate.reduce.out_features if gate.reads_residual else 0
    floats = rows * (span(gate.hidden.in_features - reduced) + WARPS) + -(-rows * rank // 4) * 4
    columns = -(-writer.model.config.hidden_size // writer.multiprocessors)
    numbers = (rows * span(reduced) if rows > 1 else 0) + columns * rank
    return 4 * floats + numbers * (16 // writer.shape.lane_numbers)


def _moved(writer: StepWriter, layer: int) -> dict[str, Any]:
    """What tells how `layer` moved the rows that ran it, while its two states are still there."""
    return {
        "before_Bd": writer.entering(layer),
        "after_Bd": writer.entering(layer + 1),
        "left_skip_B": writer.skip_B(layer),
        "width": writer.model.config.hidden_size,
    }


def write_move(writer: StepWriter, layer: FBSLayer) -> None:
    """Note the motion of a layer that always runs inside a block: the next layer asks no gate that would."""
    after = layer.index + 1
    inside = after < writer.model.config.layer_count and after % writer.model.config.gate_block
    if inside and writer.free and layer.index not in writer.free:
        moved = _moved(writer, layer.index)
        writer.call("move", motion_B2=writer.gates.motion_B2, **moved)


def write_boundary(writer: StepWriter, layer: FBSLayer) -> None:
    """Where chunks close."""
    chunks, front = writer.chunks, writer.layers.front(layer.index)
    assert chunks is not None
    writer.call(
        "boundary", front=front, front_stride=front.stride(0),
        label_at=writer.fronts[layer.index].place["label"], ring_length=writer.model.config.chunk_cache,
        closed_B=chunks.closed_B, open_size_B=chunks.open_size_B, continuable_B=chunks.continuable_B,
        before_B=chunks.before_B, slot_B=chunks.slot_B, size_B=chunks.size_B, kept_B=chunks.kept_B,
        step=writer.tokens.step, trace_steps=len(chunks.closed_TB), closed_trace=chunks.closed_TB,
        opens_trace=chunks.opens_TB,
    )  # fmt: skip


def write_chunk_read(writer: StepWriter, layer: FBSLayer) -> None:
    """h̃ += s_c·W_o·(attention to the closed chunks)."""
    reader, chunks, buffers = layer.chunk_reader, writer.chunks, writer.layers
    assert reader is not None and chunks is not None
    keys, values, _ = chunks.rings[layer.index]
    front = buffers.front(layer.index)
    width = reader.key.out_features
    skip_B = writer.skip_B(layer.index)
    void = _read_by_nobody(writer, layer)
    told: dict[str, Any] = {
        "front": front, "front_stride": front.stride(0), "query_at": writer.fronts[layer.index].place["chunk_query"],
        "null_key": reader.null_key, "null_value": reader.null_value, "keys": keys, "values": values,
        "bias_HC": reader.distance_bias, "bucket_C": chunks.bucket_C, "heads": reader.heads, "width": width,
        "buckets": reader.buckets, "ring_length": reader.cap, "scale": 1 / math.sqrt(width // reader.heads),
        "before_B": chunks.before_B, "skip_B": skip_B, "score_BHC": chunks.score_BHC, "out": chunks.mixed_BW,
    }  # fmt: skip
    for name, room in (("chunk_scores", 0), ("chunk_mix", 4 * reader.cap)):
        writer.call(name, room, **told).void_flags = skip_B
    residual = writer.entering(layer.index) if layer.paw is None else buffers.injected_Bd
    writer.product(
        "product_inject_chunks", [reader.out.weight], chunks.mixed_BW, buffers.injected_Bd,
        strength=reader.strength, residual_Bd=residual, skip_B=skip_B,
    ).void_flags = void  # fmt: skip


def write_chunk_end(writer: StepWriter, layer: FBSLayer) -> None:
    """Summaries of the chunks that close, and the open chunks' sums."""
    reader, chunks = layer.chunk_reader, writer.chunks
    assert reader is not None and chunks is not None
    keys, values, sum_Bd = chunks.rings[layer.index]
    summary = writer.product(
        "product_summary", [reader.summarise.weight], None, chunks.summary_BW, sum_Bd=sum_Bd,
        size_B=chunks.size_B, slot_B=chunks.slot_B,
    )  # fmt: skip
    ring = writer.product(
        "product_ring", [reader.key.weight, reader.value.weight], chunks.summary_BW, None,
        slot_B=chunks.slot_B, ring=[keys, values], ring_length=reader.cap,
    )  # fmt: skip
    for call in (summary, ring):
        call.void_flags, call.void_where = chunks.slot_B, Void.NO_CHUNK_CLOSES
    state = writer.entering(layer.index)
    writer.call(
        "chunk_extend", state_Bd=state, width=state.shape[1],
        eps=writer.model.config.rms_norm_eps, kept_B=chunks.kept_B, sum_Bd=sum_Bd,
    ).quiet = True  # fmt: skip  # the next step reads it
