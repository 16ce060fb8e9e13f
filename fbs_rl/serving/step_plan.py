"""What the runner tells the model about one step, and what the model reports back.

Letters: L layers, N tokens of the step, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass
class StepPlan:
    """Who may skip what in one step.

    row_R: each request's row in per-request memory. restart_R: its memory is void and begins anew. before_R, length_R:
    its tokens in front of the step, and in it.
    bars_LN: a token skips a layer iff its gate's probability reaches this (float32): τ for threshold gates, just
    above the noise for sampled ones, +inf where it must run, −inf where a replayed token skipped. None: nobody
    can skip. asks: some bar is finite, so gates are computed. replays: some is −inf. consensus: one decision for all
    tokens, by means.
    """

    row_R: np.ndarray
    restart_R: np.ndarray
    before_R: np.ndarray
    length_R: np.ndarray
    device: torch.device
    bars_LN: np.ndarray | None = None
    asks: bool = False
    replays: bool = False
    consensus: bool = False

    @cached_property
    def bar_LN(self) -> Tensor | None:
        """bars_LN on the device; to bring them there waits for it."""
        return None if self.bars_LN is None else torch.from_numpy(self.bars_LN).to(self.device)


@dataclass(slots=True)
class StepReport:
    """What one step did. skip_LN: what was executed; prob_LN: 0 where no gate was asked.

    closes_N, chunks_N: as count_trace reads them; None without a Chunk-Head.
    entered, passed_over: layers that ran for some token, and layers that ran for none.
    """

    skip_LN: np.ndarray
    prob_LN: np.ndarray
    closes_N: np.ndarray | None
    chunks_N: np.ndarray | None
    entered: int
    passed_over: int

    @classmethod
    def of(
        cls, skip_LR: np.ndarray, prob_LR: np.ndarray, closes_R: np.ndarray | None, chunks_R: np.ndarray | None
    ) -> StepReport:  # fmt: skip
        """Of a step in which all rows went through the same layers."""
        passed_over = int(skip_LR.all(1).sum())
        entered = len(skip_LR) - passed_over
        return cls(skip_LR, prob_LR, closes_R, chunks_R, entered, passed_over)

    @property
    def ready(self) -> bool:
        return True

    def result(self) -> StepReport:
        return self


class Reported(Protocol):
    """A step's report, here or on its way."""

    @property
    def ready(self) -> bool: ...

    def result(self) -> StepReport:
        """Waits for it."""
        ...


@dataclass(slots=True)
class StepTurn:
    """What the runner and the model hand each other around a step: its plan, and then its report. logits_RV: of the
    step, where it made them itself."""

    plan: StepPlan | None = None
    report: Reported | None = None
    logits_RV: Tensor | None = None
