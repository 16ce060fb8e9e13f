"""The trace of one request: what its gates did at each token that was fed, in memory and on the wire.

Shape letters: L layers, T columns. A column is one fed token behind decode_start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import TraceCost, count_trace


def columns_type(layer_count: int) -> np.dtype:
    """One column as it is stored: skips as bits, the rest plain, little-endian."""
    return np.dtype(
        [
            ("skip", np.uint8, ((layer_count + 7) // 8,)),
            ("prob", "<f4", (layer_count,)),
            ("version", "<i4"),
            ("protected", np.uint8),
            ("closes", np.bool_),
            ("chunks", "<i4"),
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class GateTrace:
    """One request; column j is what happened when token decode_start + j was fed.

    skip_TL: what was executed. prob_TL: probability of skipping, 0 where no gate acted. version_T: of the
    gates in force. protected_T: 0, or 1 + the place in Structure of what the token ran every layer for.
    closes_T: the token opened a chunk. chunks_T: chunks closed before it. Both as count_trace reads them, and
    zero without a Chunk-Head. finished: no column will follow. replayed_tokens: columns that were computed
    again after a preemption, with the same skips. gates_on: gates were computed, whatever they decided.
    """

    key: str
    prompt_tokens: int
    decode_start: int
    finished: bool
    skip_TL: np.ndarray
    prob_TL: np.ndarray
    version_T: np.ndarray
    protected_T: np.ndarray
    closes_T: np.ndarray
    chunks_T: np.ndarray
    replayed_tokens: int
    gates_on: bool = True

    def __post_init__(self) -> None:
        tokens = self.skip_TL.shape[:1]
        columns = (self.version_T, self.protected_T, self.closes_T, self.chunks_T)
        shapes = {c.shape for c in columns}
        if self.skip_TL.ndim != 2 or self.prob_TL.shape != self.skip_TL.shape or shapes != {tokens}:
            raise ValueError(
                f"a trace needs skip and prob [T, L] and the rest [T], got {self.skip_TL.shape}, "
                f"{self.prob_TL.shape} and {sorted(shapes)}"
            )

    def first(self, tokens: int) -> GateTrace:
        """The same trace with its first columns only: those behind them are of tokens that nobody asked for."""
        columns = ("skip_TL", "prob_TL", "version_T", "protected_T", "closes_T", "chunks_T")
        return replace(self, **{name: getattr(self, name)[:tokens] for name in columns})

    @property
    def action_logp_TL(self) -> np.ndarray:
        """log p where the token skipped, log(1 − p) where it ran: float32 [T, L], the log-probability of drawn actions.

        0 where nothing was drawn: protected tokens, layers that never skip. Meant for sampled gates, each row for
        itself: thresholds draw nothing. With gate_block > 1 each layer of a block carries its one draw: count it once.
        """
        prob_TL = self.prob_TL.astype(np.float64)
        drawn_TL = (prob_TL > 0) & (self.protected_T == 0)[:, None]
        likelihood_TL = np.where(self.skip_TL, prob_TL, 1 - prob_TL)
        return np.log(likelihood_TL, where=drawn_TL, out=np.zeros_like(prob_TL)).astype(np.float32)

    def cost(self, config: FBSConfig) -> TraceCost:
        """Exact cost of the columns, batch 1, counted from decode_start on; tokens that were replayed count once.

        Raises ValueError for a trace without columns or of another model.
        """
        chunks_1T, opens_1T = (torch.from_numpy(x)[None] for x in (self.chunks_T, self.closes_T))
        return count_trace(
            config,
            torch.from_numpy(self.skip_TL.T.copy()).unsqueeze(1),
            torch.tensor([self.decode_start]),
            self.gates_on,
            chunks_1T,
            opens_1T,
        )

    def to_wire(self) -> dict[str, Any]:
        """str, int and bytes only, which any RPC carries; skips as bits."""
        layers = self.skip_TL.shape[1]
        columns = np.empty(len(self.skip_TL), columns_type(layers))
        columns["skip"] = np.packbits(self.skip_TL, axis=1)
        columns["prob"], columns["version"] = self.prob_TL, self.version_T
        columns["protected"], columns["closes"] = self.protected_T, self.closes_T
        columns["chunks"] = self.chunks_T
        return {
            "key": self.key,
            "prompt_tokens": self.prompt_tokens,
            "decode_start": self.decode_start,
            "finished": int(self.finished),
            "gates_on": int(self.gates_on),
            "replayed_tokens": self.replayed_tokens,
            "layers": layers,
            "tokens": len(columns),
            "columns": columns.tobytes(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> GateTrace:
        """What to_wire made; ValueError if a part is missing or cut off."""
        missing = sorted(_WIRE - wire.keys())
        if missing:
            raise ValueError(f"a trace lacks {', '.join(missing)}; send what to_wire() made")
        stored = columns_type(wire["layers"])
        wanted, got = wire["tokens"] * stored.itemsize, len(wire["columns"])
        if got != wanted:
            raise ValueError(
                f"the trace of {wire['key']!r} has {got} bytes of columns where {wire['tokens']} tokens "
                f"of {wire['layers']} layers have {wanted}; send what to_wire() made"
            )
        columns = np.frombuffer(wire["columns"], stored)
        return cls(
            key=wire["key"],
            prompt_tokens=wire["prompt_tokens"],
            decode_start=wire["decode_start"],
            finished=bool(wire["finished"]),
            skip_TL=unpacked_skips(columns, wire["layers"]),
            prob_TL=columns["prob"].copy(),
            version_T=columns["version"].copy(),
            protected_T=columns["protected"].copy(),
            closes_T=columns["closes"].copy(),
            chunks_T=columns["chunks"].copy(),
            replayed_tokens=wire["replayed_tokens"],
            gates_on=bool(wire["gates_on"]),
        )


_WIRE = {
    "key", "prompt_tokens", "decode_start", "finished", "gates_on", "replayed_tokens", "layers", "tokens", "columns",
}  # fmt: skip


def unpacked_skips(columns: np.ndarray, layer_count: int) -> np.ndarray:
    return np.unpackbits(columns["skip"], axis=1, count=layer_count).astype(np.bool_)
