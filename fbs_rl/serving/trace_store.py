"""What each request's gates did, kept in the process that ran them until the caller takes it.

Shape letters: L layers, B rows of one step, n columns of one request. A column is one fed token behind
decode_start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fbs_rl.gate_trace import GateTrace, columns_type, unpacked_skips

_NAMED = 3  # so many keys an error names


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
        self._column = columns_type(layer_count)
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
        version: int | np.ndarray,
        protected_n: np.ndarray | None = None,
        closes_n: np.ndarray | None = None,
        chunks_n: np.ndarray | None = None,
    ) -> None:
        """n columns of one request; None stands for zeros. version: one, or one a column.

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
        version: int | np.ndarray,
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
        return unpacked_skips(np.frombuffer(data, self._column), self._layer_count)

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
