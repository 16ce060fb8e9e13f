"""What each request's gates did, kept in the process that ran them until the caller takes it.

Shape letters: L layers, B rows of one step, n columns of one request, T all columns of it. A column is one
fed token behind decode_start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import TraceCost, count_trace

_NAMED = 3  # so many keys an error names


def _columns_type(layer_count: int) -> np.dtype:
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
        columns = np.empty(len(self.skip_TL), _columns_type(layers))
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
        columns_type = _columns_type(wire["layers"])
        wanted, got = wire["tokens"] * columns_type.itemsize, len(wire["columns"])
        if got != wanted:
            raise ValueError(
                f"the trace of {wire['key']!r} has {got} bytes of columns where {wire['tokens']} tokens "
                f"of {wire['layers']} layers have {wanted}; send what to_wire() made"
            )
        columns = np.frombuffer(wire["columns"], columns_type)
        return cls(
            key=wire["key"],
            prompt_tokens=wire["prompt_tokens"],
            decode_start=wire["decode_start"],
            finished=bool(wire["finished"]),
            skip_TL=_unpacked(columns, wire["layers"]),
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


def _unpacked(columns: np.ndarray, layer_count: int) -> np.ndarray:
    return np.unpackbits(columns["skip"], axis=1, count=layer_count).astype(np.bool_)


# --- store --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Request:
    """columns: their bytes one after another; a bytearray grows in amortised constant time."""

    key: str | None
    prompt_tokens: int
    decode_start: int
    gates_on: bool
    columns: bytearray = field(default_factory=bytearray)
    replayed_tokens: int = 0
    finished_s: float | None = None

    def wire(self, layer_count: int, column_bytes: int) -> dict[str, Any]:
        return {
            "key": self.key or "",
            "prompt_tokens": self.prompt_tokens,
            "decode_start": self.decode_start,
            "finished": int(self.finished_s is not None),
            "gates_on": int(self.gates_on),
            "replayed_tokens": self.replayed_tokens,
            "layers": layer_count,
            "tokens": len(self.columns) // column_bytes,
            "columns": bytes(self.columns),
        }


class TraceStore:
    """The columns of running requests, and finished traces until they are taken.

    Running requests are never dropped: they are replayed from here after a preemption. Finished traces go
    after keep_s, or oldest first while everything together is over limit_bytes; `dropped` counts them.
    For one thread.
    """

    def __init__(
        self,
        layer_count: int,
        limit_bytes: int = 256 << 20,
        keep_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layer_count, self._limit_bytes = layer_count, limit_bytes
        self._keep_s, self._clock = keep_s, clock
        self._column = _columns_type(layer_count)
        self._running: dict[str, _Request] = {}
        self._finished: list[_Request] = []  # in the order in which they finished
        self._bytes = 0
        self.dropped = 0

    def __contains__(self, request_id: str) -> bool:
        """Whether the request runs."""
        return request_id in self._running

    @property
    def bytes(self) -> int:
        """Of all columns, running and finished."""
        return self._bytes

    def open(
        self,
        request_id: str,
        key: str | None,
        prompt_tokens: int,
        decode_start: int,
        gates_on: bool = True,
    ) -> None:
        """Begin a request; ValueError if it runs already (a resumed one goes on with its columns)."""
        if request_id in self._running:
            raise ValueError(f"request {request_id} has a trace already; append to it")
        self._running[request_id] = _Request(key, prompt_tokens, decode_start, gates_on)

    def length(self, request_id: str) -> int:
        """Columns recorded so far; KeyError for a request that does not run."""
        return len(self._running[request_id].columns) // self._column.itemsize

    def append(
        self,
        request_id: str,
        skip_nL: np.ndarray,
        prob_nL: np.ndarray,
        version: int,
        protected_n: np.ndarray | None = None,
        closes_n: np.ndarray | None = None,
        chunks_n: np.ndarray | None = None,
    ) -> None:
        """n columns of one request; None stands for zeros.

        Raises ValueError for shapes that do not fit, KeyError for a request that does not run.
        """
        data = self._encode(
            len(skip_nL), skip_nL, prob_nL, version, protected_n, closes_n, chunks_n
        )
        self._running[request_id].columns += data
        self._bytes += len(data)

    def append_rows(
        self,
        request_ids: Sequence[str],
        skip_BL: np.ndarray,
        prob_BL: np.ndarray,
        version: int,
        protected_B: np.ndarray | None = None,
        closes_B: np.ndarray | None = None,
        chunks_B: np.ndarray | None = None,
    ) -> None:
        """One column for each request of a decoding step. Errors as append; nothing is kept then."""
        requests = [self._running[request_id] for request_id in request_ids]
        data = self._encode(
            len(requests), skip_BL, prob_BL, version, protected_B, closes_B, chunks_B
        )
        size = self._column.itemsize
        for row, request in enumerate(requests):
            request.columns += data[row * size : (row + 1) * size]
        self._bytes += len(data)

    def _encode(
        self,
        count: int,
        skip_nL: np.ndarray,
        prob_nL: np.ndarray,
        version: int,
        protected_n: np.ndarray | None,
        closes_n: np.ndarray | None,
        chunks_n: np.ndarray | None,
    ) -> bytes:
        expected = (count, self._layer_count)
        if skip_nL.dtype != np.bool_ or skip_nL.shape != expected or prob_nL.shape != expected:
            raise ValueError(
                f"columns need bool skip and prob of shape {expected}, "
                f"got {skip_nL.dtype} {skip_nL.shape} and {prob_nL.shape}"
            )
        columns = np.zeros(count, self._column)
        columns["skip"] = np.packbits(skip_nL, axis=1)
        columns["prob"], columns["version"] = prob_nL, version
        parts = {"protected": protected_n, "closes": closes_n, "chunks": chunks_n}
        for name, values in parts.items():
            if values is not None:
                columns[name] = values
        return columns.tobytes()

    def skips(self, request_id: str, start: int, stop: int) -> np.ndarray:
        """Columns start to stop - 1, bool [n, L]; ValueError for columns that are not there."""
        length = self.length(request_id)
        if not 0 <= start <= stop <= length:
            raise ValueError(f"request {request_id} has {length} columns, not {start} to {stop}")
        size = self._column.itemsize
        data = self._running[request_id].columns[start * size : stop * size]
        return _unpacked(np.frombuffer(data, self._column), self._layer_count)

    def note_replay(self, request_id: str, tokens: int) -> None:
        """Count columns that were computed again after a preemption."""
        self._running[request_id].replayed_tokens += tokens

    def peek(self, request_id: str) -> GateTrace:
        """The trace of a running request so far; KeyError for one that does not run."""
        return self._trace(self._running[request_id])

    def finish(self, request_id: str) -> GateTrace | None:
        """The whole trace, with "" for a missing key; None for a request that does not run.

        A trace with a key is kept until it is taken, one without is forgotten here.
        """
        request = self._running.pop(request_id, None)
        if request is None:
            return None
        request.finished_s = self._clock()
        trace = self._trace(request)
        if request.key is None:
            self._bytes -= len(request.columns)
        else:
            self._finished.append(request)
        self.drop_stale()
        return trace

    def take(self, keys: Sequence[str] | None) -> list[dict[str, Any]]:
        """The traces of these keys in wire form, taken once; None: all finished ones.

        In the order of the keys; several requests of one key in the order in which they finished. A request that
        still runs gives what there is so far, and no more later: an engine may hear of an end a step late.
        Raises ValueError if a key has no trace; nothing is taken then.
        """
        if keys is None:
            taken, self._finished = self._finished, []
        else:
            self._refuse_missing(keys)
            place = {key: i for i, key in reversed(list(enumerate(keys)))}
            taken = [request for request in self._finished if request.key in place]
            self._finished = [request for request in self._finished if request.key not in place]
            taken += [request for request in self._running.values() if request.key in place]
            taken.sort(key=lambda request: place[request.key or ""])
        wires = [request.wire(self._layer_count, self._column.itemsize) for request in taken]
        for request in taken:
            if request.finished_s is None:
                request.key = None
            else:
                self._bytes -= len(request.columns)
        return wires

    def _refuse_missing(self, keys: Sequence[str]) -> None:
        known = {request.key for request in [*self._finished, *self._running.values()]}
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        if not missing:
            return
        named = [repr(key) for key in missing[:_NAMED]]
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ValueError(
            f"there is no trace of {', '.join(named)}{more}; ask within {self._keep_s:g} s of the request's end, "
            f"for the request_key it was sent with"
        )

    def drop_stale(self) -> int:
        """Forget finished traces that are too old, or that are too many; how many went."""
        oldest_s = self._clock() - self._keep_s
        gone = 0
        for request in self._finished:
            assert request.finished_s is not None
            if request.finished_s >= oldest_s and self._bytes <= self._limit_bytes:
                break
            self._bytes -= len(request.columns)
            gone += 1
        del self._finished[:gone]
        self.dropped += gone
        return gone

    def _trace(self, request: _Request) -> GateTrace:
        return GateTrace.from_wire(request.wire(self._layer_count, self._column.itemsize))
