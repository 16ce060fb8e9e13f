"""One place, one number format, and what tests of the decoder's calls need there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fbs_rl.decode.kernel_arguments import Call, kinds, make_call
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.product_plan import ProductPlan
from fbs_rl.decode.program import Program
from tests.decode_launchers import make_launcher

ROWS, HEAD_DIM, GROUP = 3, 16, 2
FORMATS = [torch.float32, torch.bfloat16]
ERROR = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


class Bench:
    """One place, one format, and tensors on it that are NaN until something is written."""

    def __init__(self, place: str, dtype: torch.dtype, rows: int = ROWS) -> None:
        self.dtype = dtype
        self.shape = KernelShape(rows, dtype == torch.bfloat16, HEAD_DIM, GROUP)
        self.launcher = make_launcher(place, self.shape)
        self.device = self.launcher.device
        self.draw = torch.Generator().manual_seed(7)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.device, self.dtype)

    def blank(self, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, device=self.device, dtype=self.dtype)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def run(self, *calls: Call) -> None:
        launcher = self.launcher
        program = Program.of(calls, self.shape, launcher.multiprocessors, self.device)
        launcher.run(program, 0, len(calls))

    def product(
        self, name: str, weights: list[Tensor], skip_B: Tensor | None = None, kept_from: int = -1, **values: Any
    ) -> None:  # fmt: skip
        self.run(self.product_call(name, weights, skip_B, kept_from, **values))

    def product_call(
        self, name: str, weights: list[Tensor], skip_B: Tensor | None = None, kept_from: int = -1, **values: Any
    ) -> Call:  # fmt: skip
        rows, columns = [len(w) for w in weights], weights[0].shape[1]
        kind, multiprocessors = kinds()[name], self.launcher.multiprocessors
        plan = ProductPlan.of(sum(rows), columns, self.shape, multiprocessors, kind)
        matrices = {
            "matrix": weights, "rows": rows, "columns": columns, "paired": int(kind.writes == "GATED"),
            "kept_from": kept_from, "skip_B": skip_B, **plan.weights(),
        }  # fmt: skip
        values = {"eps": 1e-6, "input_stride": columns} | values
        norm = values.get("norm")
        room = plan.room_bytes + (0 if norm is None else norm.nbytes)
        if kind.reads == "BOTH":
            room += self.shape.rows * self.shape.row_bytes(columns)
            values = {"bare_from": sum(rows[:-1]), "keeps": 1} | values
        return make_call(name, room, weights=matrices, **values)


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    error = (found.double().cpu() - wanted.cpu()).norm() / wanted.norm().cpu()
    assert error < ERROR[dtype]
