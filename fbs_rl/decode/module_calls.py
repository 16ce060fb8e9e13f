"""The kernel calls of PAW, the Chunk-Head and the gates in one layer of a decoding step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fbs_rl.decode.kernel_arguments import Void
from fbs_rl.decode.program import WARPS
from fbs_rl.decode.step_buffers import MOST_FOUND, PreviewBuffers
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.preview import Paw
from fbs_rl.types import Compression, KVPolicy

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


def write_chunks(writer: StepWriter, layer: FBSLayer) -> None:
    """h̃ += s_c·W_o·(attention to the closed chunks); and, while blocks would wait for each other, the summary of the
    chunk that closes, which is read from the next token on."""
    reader, chunks, buffers = layer.chunk_reader, writer.chunks, writer.layers
    assert reader is not None and chunks is not None
    skip_B, (keys, values, _) = writer.skip_B(layer.index), chunks.rings[layer.index]
    front, width = buffers.front(layer.index), reader.key.out_features
    told: dict[str, Any] = {
        "front": front, "front_stride": front.stride(0), "query_at": writer.fronts[layer.index].place["chunk_query"],
        "null_key": reader.null_key, "null_value": reader.null_value, "keys": keys, "values": values,
        "bias_HC": reader.distance_bias, "bucket_C": chunks.bucket_C, "heads": reader.heads, "width": width,
        "buckets": reader.buckets, "ring_length": reader.cap, "scale": 1 / math.sqrt(width // reader.heads),
        "before_B": chunks.before_B, "skip_B": skip_B, "score_BHC": chunks.score_BHC, "out": chunks.mixed_BW,
    }  # fmt: skip
    _write_summary(writer, layer)
    writer.call("chunk_scores", 0, **told).void_flags = skip_B
    writer.call("chunk_mix", 4 * reader.cap, **told).void_flags = skip_B
    _write_chunk_end(writer, layer)
    residual = writer.entering(layer.index) if layer.paw is None else buffers.injected_Bd
    writer.product(
        "product_inject_chunks", [reader.out.weight], chunks.mixed_BW, buffers.injected_Bd,
        strength=reader.strength, residual_Bd=residual, skip_B=skip_B,
    ).void_flags = _read_by_nobody(writer, layer)  # fmt: skip


def _write_summary(writer: StepWriter, layer: FBSLayer) -> None:
    """Of the chunk that this token closes, by what the tokens before it left."""
    reader, chunks = layer.chunk_reader, writer.chunks
    assert reader is not None and chunks is not None
    call = writer.product(
        "product_summary", [reader.summarise.weight], None, chunks.summary_BW, sum_Bd=chunks.rings[layer.index][2],
        size_B=chunks.size_B, slot_B=chunks.slot_B, early=1,
    )  # fmt: skip
    call.void_flags, call.void_where = chunks.slot_B, Void.NO_CHUNK_CLOSES
    # It is awaited behind the scores, or by itself where there are none.
    call.quiet, call.quiet_flags = True, writer.skip_B(layer.index)
    call.quiet_where = Void.SOME_ROW_RUNS


def _write_chunk_end(writer: StepWriter, layer: FBSLayer) -> None:
    """Its key and value, in the place of the oldest one, which others may have read until now; and the open chunks'
    sums. The next step reads both."""
    reader, chunks, state = layer.chunk_reader, writer.chunks, writer.entering(layer.index)
    assert reader is not None and chunks is not None
    keys, values, sum_Bd = chunks.rings[layer.index]
    ring = writer.product(
        "product_ring", [reader.key.weight, reader.value.weight], chunks.summary_BW, None,
        slot_B=chunks.slot_B, ring=[keys, values], ring_length=reader.cap,
    )  # fmt: skip
    ring.void_flags, ring.void_where, ring.quiet = chunks.slot_B, Void.NO_CHUNK_CLOSES, True
    writer.call(
        "chunk_extend", state_Bd=state, width=state.shape[1],
        eps=writer.model.config.rms_norm_eps, kept_B=chunks.kept_B, sum_Bd=sum_Bd,
    ).quiet = True  # fmt: skip
