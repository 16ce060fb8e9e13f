"""The small matrices of a layer that read x̂, side by side, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.skip_path import SkipAdapter

_ALIGNED = 8  # outputs begin at multiples of this, so that 16-byte loads can read them
Part = tuple[str, Tensor, Tensor | None, Tensor | None]
"""Name, weight, bias and scale of some outputs: bias + scale·(weight·x̂)."""


@dataclass(slots=True)
class FrontRows:
    """Rows for one layer. place: where each part's outputs begin. parts is kept to copy changed weights again."""

    weight_Fd: Tensor
    bias_F: Tensor
    scale_F: Tensor
    place: dict[str, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return self.weight_Fd.shape[0]

    @classmethod
    def of(cls, model: FBSForCausalLM, layer: FBSLayer, gates_act: bool) -> FrontRows | None:
        """The layer's rows, None if it has none."""
        parts = list(_parts(model, layer, gates_act))
        if not parts:
            return None
        width = sum(-(-len(part[1]) // _ALIGNED) * _ALIGNED for part in parts)
        first = parts[0][1]
        made = cls(
            first.new_zeros(width, first.shape[1]), first.new_zeros(width), first.new_ones(width)
        )
        made.copy(model, layer, gates_act)
        return made

    @torch.no_grad()
    def copy(self, model: FBSForCausalLM, layer: FBSLayer, gates_act: bool) -> None:
        """Take the modules' present weights."""
        at = 0
        for name, weight, bias, scale in _parts(model, layer, gates_act):
            rows = slice(at, at + len(weight))
            self.weight_Fd[rows] = weight
            if bias is not None:
                self.bias_F[rows] = bias
            if scale is not None:
                self.scale_F[rows] = scale
            self.place[name] = at
            at += -(-len(weight) // _ALIGNED) * _ALIGNED


def _parts(model: FBSForCausalLM, layer: FBSLayer, gates_act: bool) -> Iterator[Part]:
    gate, paw, reader = layer.skip_gate, layer.paw, layer.chunk_reader
    if gates_act and gate is not None and gate.reads_residual:
        yield "reduce", gate.reduce.weight, None, None
    if gates_act and isinstance(layer.skip_path, SkipAdapter):
        yield "adapter", layer.skip_path.down.weight, None, None
    if paw is not None:
        assert model.model.preview is not None
        head = model.model.preview
        yield "query", head.state_proj.weight, paw.query_bias_R, paw.query_scale_R
        if paw.fixed_window is None:
            yield "window", paw.window_in.weight, None, None
    if layer.index == model.config.boundary_layer:
        assert model.model.boundary is not None
        classify = model.model.boundary.classify
        yield "label", classify.weight, classify.bias, None
    if reader is not None:
        yield "chunk_query", reader.query.weight, None, None
