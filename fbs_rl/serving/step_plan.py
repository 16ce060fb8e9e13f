"""What the runner tells the model about one step, and what the model reports back.

Letters: L layers, N tokens of the step, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(slots=True)
class StepPlan:
    """Who may skip what in one step.

    row_R: each request's row in per-request memory. restart_R: its memory is void and begins anew.
    bar_LN: a token skips a layer iff its gate's probability reaches this (float32): τ for threshold gates, just
    above the noise for sampled ones, +inf where it must run, −inf where a replayed token skipped. None: nobody
    can skip. asks: some bar is finite, so gates are computed. consensus: one decision for all tokens, by means.
    """

    row_R: np.ndarray
    restart_R: np.ndarray
    bar_LN: Tensor | None = None
    asks: bool = False
    consensus: bool = False


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
