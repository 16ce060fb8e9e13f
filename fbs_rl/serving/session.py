"""A request while it is served: its options, its row in per-request memory, and what its next tokens may do.

Letters: L layers, n tokens of the request in one step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fbs_rl.decode.safety import StructureGuard
from fbs_rl.decode.structure import Structure
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.skip_gate import gate_uniform
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.types import GateMode

KINDS = list(Structure)
"""Protected tokens are traced as 1 + the place of their kind here."""
_DRAWN_AHEAD = 64


@dataclass(slots=True)
class Session:
    """decode_start: position of the first token at which gates may act. free_L: layers that may skip at all.

    next_position: of the first token that was never fed; what comes before it again is replayed. reached: up
    to where the model's memory of the request goes (-1: nowhere); vLLM drops it when it preempts.
    """

    request_id: str
    options: RequestOptions
    row: int
    decode_start: int
    free_L: np.ndarray
    guard: StructureGuard | None = None
    next_position: int = 0
    reached: int = -1
    protected: list[int] = field(default_factory=list)  # kinds of the columns of the running step
    _drawn_Ln: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _drawn_from: int = 0  # position of its first column
    _threshold_L1: np.ndarray | None = None

    @classmethod
    def begin(
        cls, request_id: str, options: RequestOptions, row: int, prompt_tokens: int, config: FBSConfig,
        guard: StructureGuard | None,
    ) -> Session:  # fmt: skip
        free_L = np.ones(config.layer_count, bool)
        free_L[sorted(config.forced_layers(options.never_skip))] = False
        start = options.check_prompt(prompt_tokens)
        return cls(request_id, options, row, start, free_L, guard)

    def columns(self, first: int, count: int) -> tuple[int, int]:
        """Of `count` tokens from position `first`: how many are replayed or new columns of the trace."""
        begin = max(first, self.decode_start)
        known = min(max(self.next_position, begin), first + count)
        return max(known - begin, 0), max(first + count - max(known, begin), 0)

    def bars(self, position_n: np.ndarray, token_n: list[int], config: FBSConfig) -> np.ndarray:
        """[L, n] float32 for tokens that are fed for the first time: see StepPlan.bar_LN."""
        if self.guard is None and self.options.mode is GateMode.THRESHOLD and len(token_n) == 1:
            self.protected = [0]
            return self._bar_L1
        bar_Ln = np.full((config.layer_count, len(position_n)), np.inf, np.float32)
        self.protected = [self._protects(token) for token in token_n]
        acts_n = np.array(self.protected) == 0
        if self.options.mode is GateMode.THRESHOLD:
            bar_Ln[np.ix_(self.free_L, acts_n)] = self.options.tau
        elif self.options.mode is GateMode.SAMPLE:
            above_Ln = self._above_noise(int(position_n[0]), len(position_n), config)
            chosen = np.ix_(self.free_L, acts_n)
            bar_Ln[chosen] = above_Ln[chosen]
        return bar_Ln

    @property
    def _bar_L1(self) -> np.ndarray:
        """Of every token of a request by thresholds, where nothing is protected."""
        if self._threshold_L1 is None:
            bar_L1 = np.where(self.free_L, self.options.tau, np.inf).astype(np.float32)
            self._threshold_L1 = bar_L1[:, None]
        return self._threshold_L1

    def _protects(self, token: int) -> int:
        if self.guard is None:
            return 0
        self.guard.push([token])
        kind = self.guard.kinds[0].pop()  # the trace keeps them
        return 0 if kind is None else 1 + KINDS.index(kind)

    def _above_noise(self, first: int, count: int, config: FBSConfig) -> np.ndarray:
        """Bars of sampled gates [L, n]: z = 1[u < p] is z = 1[p >= the next number above u]."""
        at = first - self._drawn_from
        if at < 0 or at + count > self._drawn_Ln.shape[1]:
            # For later tokens too: drawing many costs little more than drawing one.
            noise_Ln = self._noise(np.arange(first, first + max(count, _DRAWN_AHEAD)), config)
            self._drawn_Ln, self._drawn_from = np.nextafter(noise_Ln, np.float32(2)), first
            at = 0
        return self._drawn_Ln[:, at : at + count]

    def _noise(self, position_n: np.ndarray, config: FBSConfig) -> np.ndarray:
        layer_L11 = torch.arange(config.layer_count).view(-1, 1, 1)
        leader_L11 = layer_L11 - layer_L11 % config.gate_block  # one decision a block
        seed_1 = torch.tensor([self.options.seed])
        position_1n = torch.from_numpy(position_n).unsqueeze(0)
        noise_Ln = gate_uniform(seed_1, position_1n, leader_L11)[:, 0]
        policy = self.options.policy
        return (noise_Ln if policy is None else policy.noise(noise_Ln)).numpy()
