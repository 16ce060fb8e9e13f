"""Decode steps of a few rows as one launch of the graph decoder's kernel, on vLLM's pages (docs/decode.md).

What steps carry from one to the next lies in the kernel's memory as long as the same requests go on, and goes back to
where other steps find it before anything else happens. No step waits for the device: what it decided stays there in a
trace, which comes to the host when it is full or somebody asks.

Letters: R rows of one token each, B rows that a kernel was compiled for (those behind the first R are idle), L layers,
T steps of a trace, G key heads, P pages of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fbs_rl.decode.cuda_launcher import CudaLauncher, Launcher
from fbs_rl.decode.kernel_source import KernelShape
from fbs_rl.decode.step_buffers import Pages
from fbs_rl.decode.step_program import StepOptions, StepProgram, copy_weights, kernel_shape
from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.decode.supported import check_supported
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.serving.decode_graphs import CudaRecorder, Recorder
from fbs_rl.serving.kernel_trace import KernelTrace, TracedStep
from fbs_rl.serving.paged_attention import PagedBatch, cache_of
from fbs_rl.serving.step_plan import StepPlan
from fbs_rl.types import GateMode

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel

_TRACED = 64  # steps, whose decisions come to the host together
_COUNTS = ("closed", "open_size", "continuable")  # of ChunkRows and of ChunkBuffers


@dataclass(slots=True)
class _Kernel:
    """One number of rows. made: which a captured launch reads, so it is kept as long. row_R: whose memory it holds;
    empty: nobody's. before_R: the position that each of them feeds next. told: bars that it was last told, with the
    number of rows."""

    made: StepProgram
    page_BP: Tensor
    replay: Callable[[], None]
    trace: KernelTrace
    row_R: tuple[int, ...] = ()
    before_R: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    told: tuple[int, np.ndarray | None] | None = None

    @property
    def writer(self) -> StepWriter:
        return self.made.writer


class KernelSteps:
    """view: the served model as the kernels are told of it. longest: text that the engine takes, in tokens.

    Raises ValueError, in one sentence, for a model or a device that the kernels cannot do.
    """

    def __init__(
        self, model: ServedModel, view: FBSForCausalLM, longest: int, recorder: Recorder | None = None,
        make_launcher: Callable[[KernelShape], Launcher] = CudaLauncher,
    ) -> None:  # fmt: skip
        check_supported(view, GateMode.THRESHOLD if model.config.gate else GateMode.DENSE, longest)
        self.model, self.view, self.longest = model, view, longest
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.make_launcher = make_launcher
        config = model.config
        self._layers, self._block = config.layer_count, config.gate_block
        self._free = sorted(set(range(config.layer_count)) - config.protected_layers)
        # The kernels ask for the bar of a decision at the first of its layers, which itself may never skip.
        self._bar_of = list(range(config.layer_count))
        for layer in reversed(self._free):
            self._bar_of[self._leader(layer)] = layer
        self._kernels: dict[int, _Kernel] = {}
        self._resident: _Kernel | None = None
        self.steps = 0  # that were taken

    def prepare(self, pages: Sequence[Tensor]) -> None:
        """Compile and capture for every number of rows. pages: of each layer [pages, G, entries, 2·D]."""
        for rows in self.model.settings.kernel_rows:
            self._kernels[rows] = self._make(rows, pages)

    def takes(self, plan: StepPlan, batch: PagedBatch) -> bool:
        """Whether this step is for it: it decodes, nothing is replayed, and there is a kernel for so many rows."""
        if not batch.decodes or self._rows_for(len(plan.row_R)) is None:
            return False
        bars_LR = plan.bars_LN
        return bars_LR is None or (
            plan.asks and not plan.replays and (self._block == 1 or self._shares_bars(bars_LR))
        )

    def run(
        self, id_R: Tensor, position_R: Tensor, plan: StepPlan, batch: PagedBatch
    ) -> tuple[Tensor, Tensor, TracedStep]:
        """States behind the last layer [R, d], logits [R, V], both valid until the next step; and what it decided."""
        count, rows = len(id_R), self._rows_for(len(id_R))
        assert rows is not None
        kernel = self._kernels[rows]
        row_R, writer = tuple(plan.row_R.tolist()), kernel.writer
        goes_on = kernel is self._resident and kernel.row_R == row_R
        if not goes_on or not np.array_equal(kernel.before_R, plan.before_R):
            self.leave()
            self._enter(kernel, row_R)
            writer.tokens.position_B[:count].copy_(position_R)
            self._tell_pages(kernel, batch, count)
        elif (plan.before_R % batch.page == 0).any():  # some row goes on in a new page
            self._tell_pages(kernel, batch, count)
        if count < rows:  # the kernel moves all rows on
            writer.tokens.position_B[count:].zero_()
            if writer.layers.length_LBG is not None:
                writer.layers.length_LBG[:, count:].zero_()
        writer.tokens.token_B[:count].copy_(id_R)
        self._tell_bars(kernel, plan.bars_LN, count)
        step = kernel.trace.next(count)
        kernel.replay()
        kernel.before_R = plan.before_R + 1
        self.steps += 1
        return writer.entering(self._layers)[:count], writer.tokens.logits_BV[:count], step

    def leave(self) -> None:
        """Put back what steps carry, before other steps need it or their requests are over."""
        kernel, self._resident = self._resident, None
        if kernel is None:
            return
        row_R, count, writer = list(kernel.row_R), len(kernel.row_R), kernel.writer
        kernel.row_R = ()
        kernel.trace.end()
        lengths = writer.layers.length_LBG
        self.model.entries[:, row_R] = (
            kernel.before_R if lengths is None else lengths[:, :count, 0].cpu().numpy()
        )
        chunks, held = writer.chunks, self.model.chunk_rows
        if chunks is None or held is None:
            return
        at = _places(row_R, held.device)
        for name in _COUNTS:
            table = getattr(held, name)
            table[at] = getattr(chunks, f"{name}_B")[:count].to(table.dtype)
        for layer, (keys, values, sum_Bd) in chunks.rings.items():
            held.key[layer][at, :-1] = keys[:count]
            held.value[layer][at, :-1] = values[:count]
            held.open_sum[layer][at] = sum_Bd[:count]

    def copy_weights(self, previews: bool) -> None:
        """Follow a change of the model's weights in place."""
        for kernel in self._kernels.values():
            copy_weights(kernel.writer, previews)

    # --- inside --------------------------------------------------------------------------------------

    def _rows_for(self, count: int) -> int | None:
        """The kernel for so many rows. Idle rows would have a part in a decision of all rows together."""
        if count in self._kernels:
            return count
        more = [] if self.model.settings.consensus else [r for r in self._kernels if r > count]
        return min(more, default=None)

    def _shares_bars(self, bars_LR: np.ndarray) -> bool:
        """Whether layers of one decision have one bar, but for those that never skip."""
        asked = [self._bar_of[self._leader(layer)] for layer in self._free]
        return bool((bars_LR[self._free] == bars_LR[asked]).all())

    def _leader(self, layer: int) -> int:
        return layer - layer % self._block

    def _enter(self, kernel: _Kernel, row_R: tuple[int, ...]) -> None:
        rows, count, writer = list(row_R), len(row_R), kernel.writer
        # Idle rows write into the first page, which vLLM gives nobody.
        kernel.page_BP[count:].zero_()
        lengths = writer.layers.length_LBG
        if lengths is not None:
            entry_LR = torch.from_numpy(self.model.entries[:, rows])
            lengths[:, :count] = entry_LR.to(lengths).unsqueeze(-1)
        chunks, held = writer.chunks, self.model.chunk_rows
        if chunks is not None and held is not None:
            at = _places(rows, held.device)
            for name in _COUNTS:
                target_B = getattr(chunks, f"{name}_B")
                target_B.zero_()
                target_B[:count] = getattr(held, name)[at].to(target_B.dtype)
            for layer, (keys, values, sum_Bd) in chunks.rings.items():
                keys[:count] = held.key[layer][at, :-1]
                values[:count] = held.value[layer][at, :-1]
                sum_Bd[:count] = held.open_sum[layer][at]
        kernel.row_R, self._resident = row_R, kernel

    def _tell_pages(self, kernel: _Kernel, batch: PagedBatch, count: int) -> None:
        pages_RP = batch.block_RP[:count, : kernel.page_BP.shape[1]]
        kernel.page_BP[:count, : pages_RP.shape[1]].copy_(pages_RP)

    def _tell_bars(self, kernel: _Kernel, bars_LR: np.ndarray | None, count: int) -> None:
        """Idle rows skip whatever they can, so that no layer is read for them."""
        if kernel.told is not None and kernel.told[0] == count and _same(kernel.told[1], bars_LR):
            return
        bar_LB = kernel.writer.gates.bar_LB
        assert bar_LB is not None
        bars_LB = np.full(tuple(bar_LB.shape), -np.inf, np.float32)
        bars_LB[:, :count] = np.inf if bars_LR is None else bars_LR[self._bar_of]
        kernel.told, found = (count, bars_LR), torch.from_numpy(bars_LB)
        if bar_LB.is_cuda:
            found = found.pin_memory()
        bar_LB.copy_(found, non_blocking=True)

    def _make(self, rows: int, pages: Sequence[Tensor]) -> _Kernel:
        shape = kernel_shape(self.view, rows, paged=True)
        launcher = self.make_launcher(shape)
        columns = -(-self.longest // pages[0].shape[2])
        page_BP = torch.zeros(rows, columns, dtype=torch.int32, device=launcher.device)
        options = StepOptions(
            self.longest, _TRACED, gates_act=self.model.config.gate, together=self.model.settings.consensus, bars=True,
            picks=False, pages=Pages(*_entries(pages, self.view), page_BP),
        )  # fmt: skip
        made = StepProgram.of(self.view, shape, launcher, options)
        writer, end = made.writer, len(made.writer.calls)
        assert writer.gates.bar_LB is not None
        writer.gates.bar_LB.fill_(-torch.inf)

        def work() -> None:
            launcher.run(made.program, 0, end)

        work()  # compiles and reserves what a capture must not; all rows are idle
        writer.tokens.step.zero_()
        return _Kernel(made, page_BP, self.recorder.record(work), KernelTrace(writer))


def _places(rows: list[int], device: torch.device) -> slice | Tensor:
    """To index per-request memory with, without waiting for the device."""
    if len(rows) == 1:
        return slice(rows[0], rows[0] + 1)
    index = torch.tensor(rows)
    if device.type == "cuda":
        index = index.pin_memory()
    return index.to(device, non_blocking=True)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or np.array_equal(one, other)


def _entries(pages: Sequence[Tensor], view: FBSForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each layer [pages, entries, G, D], in place."""
    size, dtype = view.config.head_dim, view.dtype
    entries = pages[0].shape[2]
    if pages[0].dtype != dtype or entries & (entries - 1):
        raise ValueError(
            f"fbs.decode_path is 'kernel', which needs a cache in {dtype} and pages of a power of two of entries; this "
            f"engine has {pages[0].dtype} and {entries}: leave kv_cache_dtype and block_size out"
        )
    parts = [layer.transpose(1, 2).split(size, dim=-1) for layer in pages]
    return [keys for keys, _ in parts], [values for _, values in parts]


def pages_of(model: ServedModel) -> list[Tensor]:
    """Every layer's pages, as FlashAttention keeps them."""
    return [cache_of(layer.self_attn.attn) for layer in model.served_layers()]
