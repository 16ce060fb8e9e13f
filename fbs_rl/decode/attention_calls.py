"""The kernel calls of attention: of any layer, by a guess of who skips, and where that is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fbs_rl.decode.decision_calls import write_decision, write_known_end
from fbs_rl.decode.kernel_arguments import Call, Void
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.layer import FBSLayer
from fbs_rl.types import KVPolicy

_ATTENTION_PARTS = 16  # MOST_PARTS of kernels/attention.cu


def write_guessed_attention(writer: StepWriter, layer: FBSLayer) -> None:
    """Decision and attention of a layer whose entry is the same whoever skips.

    If the layer ran at the token before, attention comes first, and each block decides while it waits for the others;
    else the decision does, with no more than keys and values before it. A wrong guess costs time alone.
    """
    guess_B = writer.guess_B(layer.index)
    first = len(writer.calls)
    _write_all(writer, layer)
    write_mix(writer, layer, None)
    write_decision(writer, layer, behind=True)
    for call in writer.calls[first:]:
        call.void_flags = guess_B
    first = len(writer.calls)
    _write_entry(writer, layer)
    write_decision(writer, layer, held=True)
    _write_late(writer, layer)
    for call in writer.calls[first:]:
        call.void_flags, call.void_where = guess_B, Void.SOME_ROW_RUNS


def write_known_attention(writer: StepWriter, layer: FBSLayer) -> None:
    """Attention of a layer of which it is known who skips it; or, where all do, the layer's end, its entry, and the
    decision of the gate that it holds."""
    guess_B = writer.guess_B(layer.index)
    first = len(writer.calls)
    _write_all(writer, layer)
    write_mix(writer, layer, writer.skip_B(layer.index))
    for call in writer.calls[first:]:
        call.void_flags = guess_B
    if guess_B is None:
        return
    first = len(writer.calls)
    if writer.model.config.kv_on_skip == KVPolicy.PROJECT:
        _write_front_first(writer, layer)
        write_known_end(writer, layer)
        _write_left(writer, layer).arguments.awaits = 1
    else:
        front = writer.fronts[layer.index]
        writer.product(
            "product_front", [front.weight_Fd], writer.entering(layer.index), writer.layers.front(layer.index),
            bias_N=front.bias_F, scale_N=front.scale_F, skip_B=writer.doubt_B(layer.index),
        )  # fmt: skip
        write_known_end(writer, layer)
    for call in writer.calls[first:]:
        call.void_flags, call.void_where = guess_B, Void.SOME_ROW_RUNS


def _write_front_first(writer: StepWriter, layer: FBSLayer) -> None:
    """What the gate asks and the skip path reads, for which all wait; meanwhile, of the same input, keys and values."""
    attention, buffers, index = layer.self_attn, writer.layers, layer.index
    queries, bias = attention.q_proj.out_features, buffers.qkv_bias.get(index)
    writer.product(
        "product_entry", [writer.fronts[index].weight_Fd], writer.entering(index), buffers.front(index),
        norm=layer.input_layernorm.weight, keeps=1, skip_B=writer.doubt_B(index),
    )  # fmt: skip
    writer.product(
        "product_held", [attention.k_proj.weight, attention.v_proj.weight], None, buffers.qkv(index)[:, queries:],
        bias_N=None if bias is None else bias[queries:], early=1, skip_B=writer.doubt_B(index),
    ).quiet = True  # fmt: skip


def _write_all(writer: StepWriter, layer: FBSLayer) -> None:
    """Queries, keys, values, and what the front makes beside them."""
    attention, buffers, front = layer.self_attn, writer.layers, writer.fronts[layer.index]
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    writer.product(
        "product_qkv_front", [*(part.weight for part in parts), front.weight_Fd], writer.entering(layer.index),
        buffers.side_BX[layer.index % 2], norm=layer.input_layernorm.weight,
        bias_N=buffers.qkv_bias.get(layer.index), skip_B=writer.guess_B(layer.index),
    )  # fmt: skip


def _write_entry(writer: StepWriter, layer: FBSLayer) -> None:
    """Keys and values, and what the gate asks: the queries wait for the decision."""
    attention, buffers, front = layer.self_attn, writer.layers, writer.fronts[layer.index]
    queries, bias = attention.q_proj.out_features, buffers.qkv_bias.get(layer.index)
    writer.product(
        "product_entry", [attention.k_proj.weight, attention.v_proj.weight, front.weight_Fd],
        writer.entering(layer.index), buffers.side_BX[layer.index % 2][:, queries:],
        norm=layer.input_layernorm.weight,
        bias_N=None if bias is None else bias[queries:], keeps=1, skip_B=writer.doubt_B(layer.index),
    )  # fmt: skip


def _write_late(writer: StepWriter, layer: FBSLayer) -> None:
    """Behind the decision: queries of the input that product_entry left in the room, and attention; or the token's
    entry alone, which waits for nobody, and nobody for it."""
    query, buffers, skip_B = layer.self_attn.q_proj, writer.layers, writer.skip_B(layer.index)
    first = len(writer.calls)
    writer.product(
        "product_held", [query.weight], None, buffers.qkv(layer.index), bias_N=buffers.qkv_bias.get(layer.index),
        skip_B=writer.gates.unwanted_B,
    )  # fmt: skip
    write_mix(writer, layer, skip_B)
    for call in writer.calls[first:]:
        call.also_flags = skip_B
    left = _write_left(writer, layer)
    left.also_flags, left.also_where = skip_B, Void.SOME_ROW_RUNS


def _write_left(writer: StepWriter, layer: FBSLayer) -> Call:
    """The token's entry in a layer that all skip, stored while the next one begins."""
    told = _attention_arguments(writer, layer, writer.skip_B(layer.index))
    left = writer.call("leave_entry", _attention_bytes(writer.shape), **told)
    left.quiet = True
    return left


def write_mix(writer: StepWriter, layer: FBSLayer, skip_B: Tensor | None) -> Call:
    """Attention to the cache, of rows that do not skip."""
    told = _attention_arguments(writer, layer, skip_B)
    return writer.call("attention", _attention_bytes(writer.shape), **told)


def _attention_arguments(
    writer: StepWriter, layer: FBSLayer, skip_B: Tensor | None
) -> dict[str, Any]:
    buffers, attention, config = writer.layers, layer.self_attn, writer.model.config
    lengths, qkv = buffers.length_LBG, buffers.qkv(layer.index)
    return {
        "qkv": qkv, "qkv_stride": qkv.stride(0), **_entries(writer, layer.index),
        "cos": buffers.cos_SD, "sin": buffers.sin_SD, "query_norm": _head_norm(attention, "q_norm"),
        "key_norm": _head_norm(attention, "k_norm"), "position_B": writer.tokens.position_B,
        "length_BG": None if lengths is None else lengths[layer.index], "skip_B": skip_B,
        "part_sums": buffers.part_sums, "part_state": buffers.part_state, "arrived": buffers.arrived,
        "out": buffers.attended_BX, "key_heads": config.num_key_value_heads, "splits": buffers.splits,
        "leaves_entry": int(config.kv_on_skip == KVPolicy.PROJECT), "scale": attention.scaling,
        "eps": config.rms_norm_eps,
    }  # fmt: skip


def _entries(writer: StepWriter, layer: int) -> dict[str, Any]:
    """Where the layer's keys and values lie."""
    buffers = writer.layers
    keys, values, page_BP = buffers.keys[layer], buffers.values[layer], buffers.page_BP
    told = {"keys": keys, "values": values}
    if page_BP is None:
        return told | {"capacity": keys.shape[2]}
    page, entry, head, _ = keys.stride()
    shift = keys.shape[1].bit_length() - 1
    return told | {
        "pages": page_BP, "page_columns": page_BP.shape[1], "page_shift": shift, "page_stride": page,
        "entry_stride": entry, "head_stride": head,
    }  # fmt: skip


def _attention_bytes(shape: KernelShape) -> int:
    """Of AttentionShared in kernels/attention.cu."""
    heads = shape.query_group * shape.head_dim
    floats = 9 * heads + 6 * shape.head_dim + (3 * _ATTENTION_PARTS + 2) * shape.query_group
    return 4 * (floats + 1)


def _head_norm(attention: Any, name: str) -> Tensor | None:
    return getattr(attention, name).weight if hasattr(attention, name) else None
