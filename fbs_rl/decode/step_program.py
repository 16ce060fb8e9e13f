"""A decoding step of one model as a program, with the memory that it works in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fbs_rl.decode.cuda_launcher import Launcher
from fbs_rl.decode.front_rows import FrontRows
from fbs_rl.decode.gate_rows import GateRows
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.layer_calls import write_advance, write_step
from fbs_rl.decode.program import Program
from fbs_rl.decode.step_buffers import (
    ChunkBuffers,
    GateBuffers,
    LayerBuffers,
    Pages,
    PreviewBuffers,
    Room,
    TokenBuffers,
)
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.model.modeling import FBSForCausalLM


@dataclass(frozen=True, slots=True)
class StepOptions:
    """tokens: most of a row, prompt included. steps: that a trace has room for. gates_act: layers may be skipped, but
    for never_skip. sampled: by noise drawn on the device, else where p reaches a bar. bars: one a layer and row, else
    one a row. together: all rows or none, by the means of p and bars. picks: the step chooses the best token itself.
    pages: where entries lie that somebody else keeps.
    """

    tokens: int
    steps: int
    gates_act: bool
    sampled: bool = False
    together: bool = False
    bars: bool = False
    picks: bool = True
    never_skip: Sequence[int] = ()
    pages: Pages | None = None


@dataclass(frozen=True, slots=True)
class StepProgram:
    """writer: what the program was written with, and its memory. to_logits: calls up to the logits, this one included;
    what follows needs the next token."""

    writer: StepWriter
    program: Program
    to_logits: int

    @classmethod
    def of(
        cls, model: FBSForCausalLM, shape: KernelShape, launcher: Launcher, options: StepOptions
    ) -> StepProgram:
        writer = _make_writer(model, shape, launcher, options)
        copy_weights(writer)
        write_step(writer)
        to_logits = len(writer.calls)
        write_advance(writer, picks=options.picks)
        program = Program.of(writer.calls, shape, launcher.multiprocessors, launcher.device)
        return cls(writer, program, to_logits)


def kernel_shape(model: FBSForCausalLM, rows: int, paged: bool = False) -> KernelShape:
    """What the kernels for this model and batch are compiled for."""
    config = model.config
    assert config.head_dim is not None and config.num_key_value_heads is not None
    group = config.num_attention_heads // config.num_key_value_heads
    return KernelShape(rows, model.dtype == torch.bfloat16, config.head_dim, group, paged)


def copy_weights(writer: StepWriter, previews: bool = True) -> None:
    """Follow a change of the model's weights in place. previews: of what previews are made of, too."""
    model = writer.model
    for layer in model.model.fbs_layers():
        if layer.index in writer.fronts:
            writer.fronts[layer.index].copy(model, layer, bool(writer.free))
        if layer.skip_gate is not None and layer.index in writer.gate_rows:
            writer.gate_rows[layer.index].copy(layer.skip_gate)
    if previews and writer.previews is not None:
        writer.previews.copy_weights(model)


def _make_writer(
    model: FBSForCausalLM, shape: KernelShape, launcher: Launcher, options: StepOptions
) -> StepWriter:
    config, blocks = model.config, launcher.multiprocessors
    room = Room(shape.rows, options.tokens, options.steps, launcher.device, model.dtype)
    free = frozenset(range(config.layer_count)) - config.forced_layers(options.never_skip)
    free = free if options.gates_act else frozenset()
    fronts, gate_rows = {}, {}
    for layer in model.model.fbs_layers():
        if free and layer.skip_gate is not None:
            gate_rows[layer.index] = GateRows.of(layer.skip_gate)
        front = FrontRows.of(model, layer, gates_act=bool(free))
        if front is not None:
            fronts[layer.index] = front
    widest = max((front.width for front in fronts.values()), default=0)
    return StepWriter(
        model=model,
        shape=shape,
        multiprocessors=blocks,
        free=free,
        sampled=options.sampled,
        together=options.together,
        fronts=fronts,
        gate_rows=gate_rows,
        tokens=TokenBuffers.empty(room, config, blocks),
        layers=LayerBuffers.empty(room, model, widest, blocks, options.pages),
        gates=GateBuffers.empty(room, config, options.bars),
        previews=PreviewBuffers.empty(room, config, blocks) if config.paw else None,
        chunks=ChunkBuffers.empty(room, config) if config.chunk else None,
    )
