"""Collects the kernel calls of a decoding step; knows the buffers and how products are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fbs_rl.decode.front_rows import FrontRows
from fbs_rl.decode.kernel_arguments import Launch, make_launch
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.product_plan import WARPS, ProductPlan
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
    tokens: TokenBuffers
    layers: LayerBuffers
    gates: GateBuffers
    previews: PreviewBuffers | None
    chunks: ChunkBuffers | None
    calls: list[Launch] = field(default_factory=list)

    def call(self, kernel: str, blocks: int, threads: int, shared_bytes: int = 0, **values: Any) -> None:  # fmt: skip
        self.calls.append(make_launch(kernel, (blocks, 1, 1), threads, shared_bytes, **values))

    def call_for_rows(
        self, kernel: str, blocks: int, threads: int, shared_bytes: int, **values: Any
    ) -> None:
        """`blocks` for each row."""
        grid = (blocks, 1, self.shape.rows)
        self.calls.append(make_launch(kernel, grid, threads, shared_bytes, **values))

    def product(
        self, kernel: str, weights: list[Tensor], source: Tensor | None, out: Tensor | None, **values: Any
    ) -> None:  # fmt: skip
        """A product of `source` [B, columns] with matrices whose outputs lie side by side in `out` [B, rows]."""
        rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
        plan = ProductPlan.of(sum(rows), columns, self.shape, self.multiprocessors)
        values = {"kept_from": -1, "eps": self.model.config.rms_norm_eps} | values
        if source is not None:
            values |= {"input": source, "input_stride": source.stride(0)}
        if out is not None:
            values |= {"out": out, "out_stride": out.stride(0)}
        self.call(
            kernel, plan.blocks, 32 * WARPS, plan.shared_bytes,
            weight=weights, rows=rows, columns=columns, splits=plan.splits, chunk=plan.chunk,
            unit_chunks=plan.unit_chunks,
            slots=plan.slots, **values,
        )  # fmt: skip

    def skip_B(self, layer: int) -> Tensor | None:
        """Flags of who skips the layer, None if nobody can."""
        return self.gates.skip_LB[layer] if layer in self.free else None

    def front(self, layer: int, part: str) -> Tensor:
        """[B, ...]: what the layer's front product makes of one part, from its first output on."""
        return self.layers.front_BF[:, self.fronts[layer].place[part] :]

    def entering(self, layer: int) -> Tensor:
        """h [B, d] in front of the layer."""
        return self.layers.state[layer % 2]
