"""How latencies are taken (the paper's appendix B.3): forced steps, warm-ups, many runs, variants in turns.

Letters: B rows, T steps, R runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.latency_engines import Engine, OwnClock, StepTrace, Workload

_COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}
_COPIES = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured of one variant. prefill_R, step_RT: milliseconds. entropy_T: nats, mean over rows.

    own_bytes: memory that the engine holds beside the model; peak_bytes: the most that was in use in its
    runs. Both None on a CPU. All three None for an engine with its own clock.
    """

    prefill_R: np.ndarray
    step_RT: np.ndarray
    entropy_T: np.ndarray | None
    trace: StepTrace
    own_bytes: int | None
    peak_bytes: int | None


class Clock:
    """Marks on the device's own time line, or on the host's where there is no device to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def milliseconds(self) -> np.ndarray:
        """Between each mark and the next; waits for the device."""
        if self.device.type != "cuda":
            return 1e3 * np.diff(np.array(self.marks))
        torch.cuda.synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return np.array([one.elapsed_time(other) for one, other in pairs])


@torch.inference_mode()
def run_request(engine: Engine, prompt_BT: Tensor, forced_BT: Tensor) -> np.ndarray:
    """Milliseconds of the prefill and of every step: [1 + T]."""
    clock = Clock(prompt_BT.device)
    if clock.device.type == "cuda":
        torch.cuda.synchronize(clock.device)
    clock.mark()
    engine.prefill(prompt_BT, forced_BT)
    clock.mark()
    for index in range(forced_BT.shape[1]):
        engine.step(index)
        clock.mark()
    return clock.milliseconds()


@torch.inference_mode()
def step_entropies(engine: Engine, prompt_BT: Tensor, forced_BT: Tensor) -> np.ndarray:
    """Entropy of the next token after every forced one, in nats, mean over rows: [T]. Not timed."""
    engine.prefill(prompt_BT, forced_BT)
    found = []
    for index in range(forced_BT.shape[1]):
        engine.step(index)
        prob_BV = engine.logits().float().softmax(-1)
        found.append(torch.special.entr(prob_BV).sum(-1).mean())
    return torch.stack(found).cpu().numpy()


def measure(
    makers: Mapping[str, Callable[[], Engine | OwnClock]], load: Workload, warmups: int, runs: int, vocabulary: int,
    device: torch.device, say: Callable[[str], None], stops: Callable[[], bool] = lambda: False,
) -> dict[str, tuple[Engine | OwnClock, Sample]]:  # fmt: skip
    """Samples by variant. The variants take turns, one request each, in a new order every round.

    stops: asked after each round. Samples are then of the rounds so far; InterruptedError if all were warm-ups.
    """
    draw = torch.Generator().manual_seed(0)
    shape = (load.rows, load.prompt_tokens + load.new_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=draw).to(device)
    prompt_BT, forced_BT = ids[:, : load.prompt_tokens], ids[:, load.prompt_tokens :]
    turns = {name: _Turns.of(make, prompt_BT, forced_BT) for name, make in makers.items()}
    names = list(turns)
    for turn in range(warmups + runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            turns[name].take(kept=turn >= warmups)
        say(f"round {turn + 1} of {warmups + runs}")
        if not stops():
            continue
        if turn < warmups:
            raise InterruptedError(
                f"stopped after {turn + 1} of {warmups} warm-ups, before anything was measured"
            )
        break
    return {name: (taken.engine, taken.sample()) for name, taken in turns.items()}


@dataclass(slots=True)
class _Turns:
    """One variant's engine, and what its turns gave."""

    engine: Engine | OwnClock
    prompt_BT: Tensor
    forced_BT: Tensor
    own_bytes: int | None
    entropy_T: np.ndarray | None
    times: list[np.ndarray] = field(default_factory=list)
    peak_bytes: int = 0

    @classmethod
    def of(
        cls, make: Callable[[], Engine | OwnClock], prompt_BT: Tensor, forced_BT: Tensor
    ) -> _Turns:
        before = _allocated(prompt_BT.device)
        engine = make()
        if isinstance(engine, OwnClock):
            return cls(engine, prompt_BT, forced_BT, None, None)
        own = None if before is None else int(_allocated(prompt_BT.device) or 0) - before
        return cls(engine, prompt_BT, forced_BT, own, step_entropies(engine, prompt_BT, forced_BT))

    def take(self, kept: bool) -> None:
        """One request; kept: it is no warm-up."""
        peak = 0
        if isinstance(self.engine, OwnClock):
            taken = np.array(self.engine.request_ms())
        else:
            device = self.prompt_BT.device
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = run_request(self.engine, self.prompt_BT, self.forced_BT)
            peak = _peak(device)
        if kept:
            self.times.append(taken)
            self.peak_bytes = max(self.peak_bytes, peak)

    def sample(self) -> Sample:
        table, trace = np.stack(self.times), self.engine.trace()
        return Sample(
            table[:, 0],
            table[:, 1:],
            self.entropy_T,
            trace,
            self.own_bytes,
            self.peak_bytes or None,
        )


def _allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy: the ceiling that steps are held against. Median of ten."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    clock = Clock(device)
    clock.mark()
    for _ in range(_COPIES):
        target.copy_(source)
        clock.mark()
    return 2 * source.numel() / float(np.median(clock.milliseconds())) * 1e3


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a figure must say of the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
