"""What steps of the graph decoder's kernel decided, fetched from the device many steps at a time.

Letters: B rows of the kernel, R of them in use, L layers, T steps of a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.decode.step_writer import StepWriter
from fbs_rl.serving.step_plan import StepReport


class KernelTrace:
    """The trace of one kernel, which the kernel itself writes, step after step from the first."""

    def __init__(self, writer: StepWriter) -> None:
        self.writer, self.room = writer, len(writer.gates.skip_TLB)
        self._part = _Part(self)
        self.taken = 0  # steps of the part

    def next(self, count: int) -> TracedStep:
        """The step that is launched next, with so many rows in use."""
        if self.taken == self.room:
            self.end()
        self.taken += 1
        return TracedStep(self._part, self.taken - 1, count)

    def end(self) -> None:
        """Send for what there is; the next step is the first again."""
        if not self.taken:
            return
        self._part.fetch(self.taken)
        self._part, self.taken = _Part(self), 0
        self.writer.tokens.step.zero_()


class _Part:
    """Some steps behind each other; on the host once they were fetched."""

    def __init__(self, trace: KernelTrace) -> None:
        self.trace: KernelTrace | None = trace  # as long as it is on the device
        self._held: list[Tensor] = []
        self._event: Any = None

    def fetch(self, steps: int) -> None:
        assert self.trace is not None
        gates, chunks = self.trace.writer.gates, self.trace.writer.chunks
        wanted = [gates.prob_TLB[:steps], gates.skip_TLB[:steps]]
        if chunks is not None:
            wanted += [chunks.closed_TB[:steps], chunks.closed_B]
        self.trace = None
        self._held = [_sent(tensor) for tensor in wanted]
        if wanted[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def ready(self) -> bool:
        return self.trace is None and (self._event is None or self._event.query())

    def arrays(self) -> list[np.ndarray]:
        """[T, L, B] probabilities and skips, and where there are chunks [T, B] closed before a step, [B] by now."""
        if self.trace is not None:
            self.trace.end()
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._held]


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One step of a part: its report, once it is asked for."""

    part: _Part
    step: int
    count: int

    @property
    def ready(self) -> bool:
        return self.part.ready

    def result(self) -> StepReport:
        prob_TLB, skip_TLB, *chunks = self.part.arrays()
        skip_LR = skip_TLB[self.step, :, : self.count].view(np.bool_)
        prob_LR = prob_TLB[self.step, :, : self.count]
        if not chunks:
            return StepReport.of(skip_LR, prob_LR, None, None)
        closed_TB, closed_B = chunks
        before_R = closed_TB[self.step, : self.count]
        last = self.step + 1 == len(closed_TB)
        after_R = (closed_B if last else closed_TB[self.step + 1])[: self.count]
        return StepReport.of(skip_LR, prob_LR, after_R > before_R, before_R.astype(np.int64))


def _sent(tensor: Tensor) -> Tensor:
    """A copy on the host, or on its way there."""
    if not tensor.is_cuda:
        return tensor.clone()
    made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return made.copy_(tensor, non_blocking=True)
