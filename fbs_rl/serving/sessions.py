"""All requests of an engine: plans each step for the model, and keeps what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from fbs_rl.decode.safety import StructureGuard
from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.serving.session import Session
from fbs_rl.serving.step_plan import Reported, StepPlan, StepReport
from fbs_rl.serving.step_stats import StepStats
from fbs_rl.serving.trace_store import TraceStore
from fbs_rl.types import GateMode


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The tokens of one request in a step: `tokens` fed from position `first` on, of a prompt of prompt_tokens.

    The last of them is -1 where it is not known on the host yet and reads_tokens() is false. extra_args: of its
    SamplingParams. prompt_ids: of the prompt.
    """

    request_id: str
    first: int
    tokens: Sequence[int]
    prompt_ids: Sequence[int]
    extra_args: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which of a step's tokens become columns of a request's trace. protected: their kinds."""

    session: Session
    first: int
    count: int
    protected: list[int]

    @property
    def span(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True)
class _Added:
    """Columns of one request as TraceStore.append takes them; None where a model has no chunks."""

    skip_nL: np.ndarray
    prob_nL: np.ndarray
    version_n: np.ndarray
    protected_n: np.ndarray
    closes_n: np.ndarray | None
    chunks_n: np.ndarray | None

    @classmethod
    def of(cls, part: _Columns, version: int, report: StepReport) -> _Added:
        session, span = part.session, part.span
        shown_nL = (report.prob_LN[:, span] * session.free_L[:, None]).T
        if session.options.mode is GateMode.DENSE:
            shown_nL = np.zeros_like(shown_nL)
        return cls(
            report.skip_LN[:, span].T,
            shown_nL,
            np.full(part.count, version),
            np.array(part.protected, np.uint8),
            None if report.closes_N is None else report.closes_N[span],
            None if report.chunks_N is None else report.chunks_N[span],
        )

    def add_to(self, traces: TraceStore, request_id: str) -> None:
        traces.append(
            request_id, self.skip_nL, self.prob_nL, self.version_n, self.protected_n, self.closes_n, self.chunks_n
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[_Added]) -> _Added:
        """All parts behind each other, in their order."""
        if len(parts) == 1:
            return parts[0]
        tables = [[getattr(part, field.name) for part in parts] for field in fields(cls)]
        return cls(*(None if table[0] is None else np.concatenate(table) for table in tables))  # pyright: ignore


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a step's report is needed for. version: of the gates that it went by."""

    columns: list[_Columns]
    replayed: int
    version: int


class Sessions:
    """decode: text of token ids, for requests that protect structure; None: the engine has no tokenizer."""

    def __init__(
        self, config: FBSConfig, settings: ServingSettings, device: torch.device,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.settings, self.device, self.decode = config, settings, device, decode
        self.traces = TraceStore(config.layer_count, settings.trace_bytes, settings.trace_s)
        self.stats = StepStats.create(settings.stats_file) if settings.stats_file else None
        self.version = 0
        self._layers = config.layer_count
        self._sessions: dict[str, Session] = {}
        self._free_rows: list[int] = []
        self._planned = _Planned([], 0, 0)
        self._waiting: deque[tuple[_Planned, Reported]] = deque()

    # --- before a step ----------------------------------------------------------------------------

    def plan(self, scheduled: Sequence[Scheduled]) -> StepPlan:
        """Who may skip what in a step that feeds these tokens, in the batch's order."""
        sessions = [self._session(item) for item in scheduled]
        pairs = list(zip(scheduled, sessions, strict=True))
        restart = [item.first != session.reached for item, session in pairs]
        columns: list[_Columns] = []
        bars, asks, replays = [], False, False
        offset = replayed = 0
        for item, session in pairs:
            bar_Ln, again, new = self._bars(session, item)
            replayed += again
            replays |= again > 0 and bool(np.isneginf(bar_Ln).any())
            asks |= bool(np.isfinite(bar_Ln).any())
            if new:
                first = offset + len(item.tokens) - new
                columns.append(_Columns(session, first, new, session.protected))
            bars.append(bar_Ln)
            session.reached = item.first + len(item.tokens)
            session.next_position = max(session.next_position, session.reached)
            offset += len(item.tokens)
        self._planned = _Planned(columns, replayed, self.version)
        rows_R = np.array([session.row for session in sessions])
        before_R, length_R = (
            np.array(x, np.int64)
            for x in zip(*((item.first, len(item.tokens)) for item in scheduled), strict=True)
        )
        plan = StepPlan(rows_R, np.array(restart), before_R, length_R, self.device)
        if asks or replays:
            bar_LN = bars[0] if len(bars) == 1 else np.concatenate(bars, axis=1)
            # One decision for all is possible only where all decode; else the layer runs for the others anyway.
            plan.consensus = self.settings.consensus and bar_LN.shape[1] == len(rows_R)
            if self.settings.consensus and not plan.consensus:
                bar_LN = np.where(np.isfinite(bar_LN), np.float32(np.inf), bar_LN)
                asks = False
            plan.bars_LN, plan.asks, plan.replays = bar_LN, asks, replays
        return plan

    def reads_tokens(self, request_id: str) -> bool:
        """Whether what a request may do depends on the tokens it is fed."""
        session = self._sessions.get(request_id)
        return session is not None and session.guard is not None

    def _session(self, item: Scheduled) -> Session:
        session = self._sessions.get(item.request_id)
        if session is None:
            options = RequestOptions.parse(item.extra_args, self.config)
            row = self._free_rows.pop() if self._free_rows else len(self._sessions)
            session = Session.begin(
                item.request_id, options, row, len(item.prompt_ids), self.config, self._guard(options, item)
            )  # fmt: skip
            self._sessions[item.request_id] = session
            self.traces.open(
                item.request_id, options.key, len(item.prompt_ids), session.decode_start,
                gates_on=options.mode is not GateMode.DENSE,
            )  # fmt: skip
        return session

    def _guard(self, options: RequestOptions, item: Scheduled) -> StructureGuard | None:
        if not options.protect_structure or options.mode is GateMode.DENSE or self.decode is None:
            return None
        return StructureGuard.of(self.decode, prompt_ids=[list(item.prompt_ids)[-8:]])

    def _bars(self, session: Session, item: Scheduled) -> tuple[np.ndarray, int, int]:
        """Bars of the item's tokens, and how many of them are columns again, and, at its end, new ones."""
        count = len(item.tokens)
        replayed, new = session.columns(item.first, count)
        if new == count and not replayed:
            position_n = np.arange(item.first, item.first + count)
            return session.bars(position_n, list(item.tokens), self.config), 0, new
        bar_Ln = np.full((self._layers, count), np.inf, np.float32)
        if replayed:
            self.settle()
            column = max(item.first, session.decode_start) - session.decode_start
            skip_nL = self.traces.skips(session.request_id, column, column + replayed)
            stop = count - new
            bar_Ln[:, stop - replayed : stop][skip_nL.T] = -np.inf
            self.traces.note_replay(session.request_id, replayed)
        if new:
            position_n = np.arange(item.first + count - new, item.first + count)
            tokens = list(item.tokens[count - new :])
            bar_Ln[:, count - new :] = session.bars(position_n, tokens, self.config)
        return bar_Ln, replayed, new

    # --- after a step -----------------------------------------------------------------------------

    def keep(self, report: Reported) -> None:
        """Add what the planned step did to its requests' traces, as soon as it is known here."""
        self._waiting.append((self._planned, report))
        self.settle(wait=False)

    def settle(self, wait: bool = True) -> None:
        """Add what is known by now; wait: for all of it."""
        known: list[tuple[_Planned, StepReport]] = []
        while self._waiting and (wait or self._waiting[0][1].ready):
            planned, report = self._waiting.popleft()
            known.append((planned, report.result()))
        for step in known:
            self._count(*step)
        # A request's columns of several steps are added at once.
        found: dict[str, list[_Added]] = {}
        for planned, report in known:
            for part in planned.columns:
                added = _Added.of(part, planned.version, report)
                found.setdefault(part.session.request_id, []).append(added)
        for request_id, added in found.items():
            _Added.joined(added).add_to(self.traces, request_id)

    def _count(self, planned: _Planned, report: StepReport) -> None:
        if self.stats is None:
            return
        columns = sum(part.count for part in planned.columns)
        protected = sum(kind > 0 for part in planned.columns for kind in part.protected)
        skipped = sum(int(report.skip_LN[:, part.span].sum()) for part in planned.columns)
        self.stats.add(
            decode_tokens=columns, decode_layer_tokens=columns * self._layers,
            skipped_layer_tokens=skipped, protected_tokens=protected, replayed_tokens=planned.replayed,
            layers_entered=report.entered, layers_skipped_whole=report.passed_over,
        )  # fmt: skip

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests are over."""
        if not request_ids:
            return
        self.settle()
        for request_id in request_ids:
            session = self._sessions.pop(request_id, None)
            if session is None:
                continue
            self._free_rows.append(session.row)
            trace = self.traces.finish(request_id)
            if trace is not None and self.stats is not None and len(trace.skip_TL):
                cost = trace.cost(self.config)
                self.stats.add(
                    executed_flops=float(cost.flops_BT.sum()), dense_flops=float(cost.dense_flops_BT.sum())
                )  # fmt: skip
        if self.stats is not None:
            self.stats.set(traces_dropped=self.traces.dropped, gate_version=self.version)

    def take(self, keys: Sequence[str] | None) -> list[dict[str, Any]]:
        """Traces in wire form; of requests that still run, what there is so far."""
        self.settle()
        return self.traces.take(keys)

    def running(self) -> list[GateTrace]:
        self.settle()
        return [self.traces.peek(name) for name in self._sessions]
