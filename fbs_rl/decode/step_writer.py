"""Collects the kernel calls of a decoding step; knows the buffers and how products are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fbs_rl.decode.front_rows import FrontRows
from fbs_rl.decode.gate_rows import GateRows
from fbs_rl.decode.kernel_arguments import Call, kinds, make_call
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.product_plan import ProductPlan
from fbs_rl.decode.step_buffers import (
    ChunkBuffers,
    GateBuffers,
    LayerBuffers,
    PreviewBuffers,
    TokenBuffers,
)
from fbs_rl.model.modeling import FBSForCausalLM


@dataclass(slots=True)
class StepWriter:
    """free: layers that may skip; empty where no gate acts. sampled: skip by noise, else by threshold.

    together: rows skip all or none, by the means of p and τ.
    """

    model: FBSForCausalLM
    shape: KernelShape
    multiprocessors: int
    free: frozenset[int]
    sampled: bool
    together: bool
    fronts: dict[int, FrontRows]
    gate_rows: dict[int, GateRows]
    tokens: TokenBuffers
    layers: LayerBuffers
    gates: GateBuffers
    previews: PreviewBuffers | None
    chunks: ChunkBuffers | None
    calls: list[Call] = field(default_factory=list)

    def call(self, name: str, room_bytes: int = 0, **values: Any) -> Call:
        self.calls.append(make_call(name, room_bytes, **values))
        return self.calls[-1]

    def product(
        self, name: str, weights: list[Tensor], source: Tensor | None, out: Tensor | None, *,
        skip_B: Tensor | None = None, slot_B: Tensor | None = None, kept_from: int = -1, **values: Any,
    ) -> Call:  # fmt: skip
        """A product of `source` [B, columns] with matrices whose outputs lie side by side in `out` [B, rows].

        skip_B, slot_B, kept_from: as in Weights of kernels/weights.cu. values: as in Product of kernels/products.cu.
        """
        rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
        kind = kinds()[name]
        plan = ProductPlan.of(sum(rows), columns, self.shape, self.multiprocessors, kind)
        values = {"eps": self.model.config.rms_norm_eps} | values
        if source is not None:
            values |= {"input": source, "input_stride": source.stride(0)}
        if out is not None:
            values |= {"out": out, "out_stride": out.stride(0)}
        matrices = {
            "matrix": weights, "rows": rows, "columns": columns, "paired": int(kind.writes == "GATED"),
            "kept_from": kept_from, "skip_B": skip_B, "slot_B": slot_B, **plan.weights(),
        }  # fmt: skip
        norm = values.get("norm")
        room = plan.room_bytes + (0 if norm is None else norm.nbytes)
        if kind.reads == "BOTH":
            room += self.held_bytes(columns)
            values = {"bare_from": sum(rows[:-1])} | values
        return self.call(name, room, weights=matrices, **values)

    def held_bytes(self, columns: int) -> int:
        """Of all rows' inputs, as a product holds them."""
        return self.shape.rows * self.shape.row_bytes(columns)

    def skip_B(self, layer: int) -> Tensor | None:
        """Flags of who skips the layer, None if nobody can. Layers that share a decision have the same."""
        return self.gates.skip_LB[self._leader(layer)] if layer in self.free else None

    def stay_B(self, layer: int) -> Tensor:
        """Flags of who does not: a call that has them for its flags is void where nobody skips."""
        return self.gates.stay_LB[self._leader(layer)]

    @property
    def ahead(self) -> bool:
        """Whether it is known before a layer begins who skips it."""
        return bool(self.free) and self.model.config.gate_ahead > 0

    @property
    def takes_along(self) -> bool:
        """Whether a product takes a decision along, where it is ahead of its layer."""
        return self.shape.rows == 1

    def bar_B(self, leader: int) -> Tensor:
        """What the probability of the layers behind this one's decision has to reach [B]."""
        return self.gates.tau_B if self.gates.bar_LB is None else self.gates.bar_LB[leader]

    def guess_B(self, layer: int) -> Tensor | None:
        """Flags, 1 in all rows if all are taken to skip the layer; None if nobody can. Where decisions are ahead of
        their layers, they say what is."""
        return self.gates.guess_LB[self._leader(layer)] if layer in self.free else None

    def doubt_B(self, layer: int) -> Tensor:
        """The other way round."""
        return self.gates.doubt_LB[self._leader(layer)]

    def _leader(self, layer: int) -> int:
        return layer - layer % self.model.config.gate_block

    def front(self, layer: int, part: str) -> Tensor:
        """[B, ...]: what the layer's front product makes of one part, from its first output on."""
        return self.layers.front(layer)[:, self.fronts[layer].place[part] :]

    def entering(self, layer: int) -> Tensor:
        """h [B, d] in front of the layer."""
        return self.layers.state[layer % 3]
