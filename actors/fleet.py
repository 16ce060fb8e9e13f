"""The rollout fleet: interchangeable engines that take chunks of questions as they become free.

A chunk's episodes are a function of the chunk, the gates and the settings, so it does not matter which worker
rolls it, nor how often one died before. Nothing waits without a deadline. A dead worker is replaced, brought to
the gates of the others, and only then given work; what it was rolling is rolled again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.gang import GangFailure, NoRoom, RankResources, WorkerError
from actors.rollout_worker import GateStamp, RolloutWorker, WorkerFacts, worker_environment
from fbs_rl.gate_bundle import GateBundle
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask
from fbs_rl.serving.engine_options import EngineOptions
from fbs_rl.serving.rollout_work import RolloutWork
from fbs_rl.setting_bounds import require_above_zero, require_not_negative

Say = Callable[[str], None]


class FleetFailure(GangFailure):
    """A deadline passed, too many workers died, or one does not have the gates it was sent."""


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """resources: of one worker; a share of a GPU puts several on one. device: "cpu" or "cuda".

    threads: of each worker; on a CPU results are equal to the bit only with the same number. chunk_deadline_s:
    for one chunk from when a worker gets it. max_replacements: of dead workers in the fleet's life.
    """

    workers: int = 1
    resources: RankResources = field(default_factory=lambda: RankResources(1))
    device: str = "cpu"
    threads: int = 1
    room_deadline_s: float = 60
    start_deadline_s: float = 600
    sync_deadline_s: float = 120
    chunk_deadline_s: float = 1800
    max_replacements: int = 10

    def __post_init__(self) -> None:
        limits = ("room_deadline_s", "start_deadline_s", "sync_deadline_s", "chunk_deadline_s")
        require_above_zero("", self, "workers", "threads", *limits)
        require_not_negative("", self, "max_replacements")
        if (self.device == "cuda") != (self.resources.gpus > 0):
            raise ValueError(
                f"the device is {self.device} and each worker takes {self.resources.gpus:g} GPUs; give "
                f'workers of device "cuda" a GPU or a share of one, and others none'
            )
        worker_environment(self.device, self.threads)


@dataclass(slots=True)
class FleetFigures:
    """What the fleet did since they were last taken. sync_bytes: sent to all workers together."""

    sync_s: float = 0.0
    sync_bytes: int = 0
    roll_s: float = 0.0
    chunks: int = 0
    episodes: int = 0
    replacements: int = 0
    work: RolloutWork = field(default_factory=RolloutWork)

    def record(self) -> dict[str, float]:
        """For metrics.jsonl; dense_s, self_s and gold_s are added up over workers, the others wall time."""
        record = {"sync/sync_s": self.sync_s, "sync/bytes": float(self.sync_bytes)}
        for name in ("roll_s", "chunks", "episodes", "replacements"):
            record[f"rollout/{name}"] = float(getattr(self, name))
        return record | {f"rollout/{name}": float(v) for name, v in self.work.record().items()}


@dataclass(slots=True)
class _Slot:
    """A place in the fleet and who has it. life: how many had it before. facts: None while it starts."""

    index: int
    name: str
    actor: Any
    life: int = 0
    facts: WorkerFacts | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """A call that was made and not answered. chunk: its number. sent: the gates that should come back."""

    slot: _Slot
    phase: str
    limit_s: float
    ends: float
    chunk: int | None = None
    sent: GateStamp | None = None


_START, _SYNC = "start", "sync"


class RolloutFleet:
    """Made by `start`; give it back with `close`, or use it in a with statement."""

    def __init__(
        self, run: str, folder: str, options: EngineOptions, settings: FleetSettings, group: PlacementGroup,
        say: Say,
    ) -> None:  # fmt: skip
        self._run, self._folder, self._options, self._settings = run, folder, options, settings
        self._group, self._say = group, say
        self._slots: list[_Slot] = []
        self._jobs: dict[Any, _Job] = {}
        self._packed: Any = None  # reference to the bytes of the current bundle
        self._names: frozenset[str] = frozenset()
        self._stamp: GateStamp | None = None
        self._model: str | None = None
        self._replacements = 0
        self.figures = FleetFigures()

    @classmethod
    def start(
        cls, run: str, folder: str, options: EngineOptions, settings: FleetSettings, say: Say = print
    ) -> RolloutFleet:  # fmt: skip
        """All workers, started on the connected cluster, with the gates of `folder`.

        Raises NoRoom if they do not fit there, FleetFailure for a late or dead worker, WorkerError for a
        folder or options that an engine refuses.
        """
        group = placement_group([settings.resources.bundle] * settings.workers, strategy="PACK")
        if not group.wait(settings.room_deadline_s):
            remove_placement_group(group)
            have = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise NoRoom(
                f"fbs-{run}-rollout: no room for {settings.workers} workers of {settings.resources.bundle} "
                f"within {settings.room_deadline_s:.0f} s; the cluster has {have}"
            )
        fleet = cls(run, folder, options, settings, group, say)
        try:
            for index in range(settings.workers):
                fleet._slots.append(_Slot(index, "", None))
                fleet._begin(fleet._slots[index])
            while fleet._jobs:
                job, answer, death = fleet._next({})
                if death is not None:
                    raise FleetFailure(f"{job.slot.name} died in its {job.phase} ({death})")
                fleet._settle(job, answer)
        except BaseException:
            fleet.close()
            raise
        return fleet

    def __enter__(self) -> RolloutFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what a training loop asks ----------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the gates that every worker has."""
        return 0 if self._stamp is None else self._stamp.version

    @property
    def facts(self) -> list[WorkerFacts | None]:
        """Of each worker; None of one that is starting."""
        return [slot.facts for slot in self._slots]

    def take_figures(self) -> FleetFigures:
        """Of the time since they were last taken."""
        taken, self.figures = self.figures, FleetFigures()
        return taken

    def sync(self, bundle: GateBundle) -> None:
        """Put these gates into every worker, and make sure that they have them.

        Raises FleetFailure if one reports another version or digest or does not answer in time, WorkerError
        for gates that do not fit, ValueError for a bundle of other tensors than the one before: a worker
        that starts later gets the last bundle alone.
        """
        began, names = time.monotonic(), frozenset(bundle.tensors)
        if self._names and names != self._names:
            odd = min(names ^ self._names)
            raise ValueError(
                f"gate version {bundle.version} does not hold the tensors of the version before ({odd} is in one of "
                f"the two); send the same parts each time"
            )
        data = bundle.pack()
        self._names, self._packed = names, ray.put(data)
        self._stamp = GateStamp(bundle.version, bundle.digest)
        for slot in self._slots:
            if slot.facts is not None:
                self._send_gates(slot)
        try:
            while self._jobs:
                job, answer, death = self._next({})
                if death is None:
                    self._settle(job, answer)
                else:
                    self._replace(job.slot, job.phase, death)
        finally:  # a sync that failed is over: workers without these gates refuse to roll
            self._jobs = {c: job for c, job in self._jobs.items() if job.phase != _SYNC}
        self.figures.sync_s += time.monotonic() - began
        self.figures.sync_bytes += len(data) * len(self._slots)

    def roll(
        self, chunks: Sequence[Sequence[RolloutTask]], settings: RolloutSettings
    ) -> list[list[EpisodeRollout]]:
        """The episodes of each chunk, in the order of the chunks.

        Raises WorkerError for what an engine refuses (it is not tried again), FleetFailure for a worker that is
        late, or when more have died than max_replacements.
        """
        began, waiting = time.monotonic(), deque(range(len(chunks)))
        rolling: dict[Any, _Job] = {}
        rolled: dict[int, list[EpisodeRollout]] = {}
        while len(rolled) < len(chunks):
            for slot in self._free(rolling.values()):
                if waiting:
                    number = waiting.popleft()
                    # One chunk a worker and none queued: the fastest takes the next one.
                    call = slot.actor.roll.remote(chunks[number], settings, self.version)
                    limit_s = self._settings.chunk_deadline_s
                    rolling[call] = self._job(slot, f"chunk {number}", limit_s, number)
            job, answer, death = self._next(rolling)
            if death is not None:
                if job.chunk is not None:
                    waiting.appendleft(job.chunk)
                self._replace(job.slot, job.phase, death)
            elif job.chunk is None:
                self._settle(job, answer)
            else:
                rolled[job.chunk] = answer.unpack()
                self.figures.work += answer.work
        self.figures.roll_s += time.monotonic() - began
        self.figures.chunks += len(chunks)
        self.figures.episodes += sum(map(len, rolled.values()))
        return [rolled[number] for number in range(len(chunks))]

    def close(self) -> None:
        """Kill all workers and give their room back. May be called again."""
        for slot in self._slots:
            if slot.actor is not None:
                ray.kill(slot.actor)
        self._slots, self._jobs = [], {}
        remove_placement_group(self._group)

    # --- workers that come and go -----------------------------------------------------------------

    def _begin(self, slot: _Slot) -> None:
        """A new actor in this slot, which starts its engine with the current gates."""
        settings, again = self._settings, f"-{slot.life}" if slot.life else ""
        slot.name, slot.facts = f"fbs-{self._run}-rollout-{slot.index}{again}", None
        resources = settings.resources
        remote = ray.remote(max_restarts=0, num_cpus=resources.cpus, num_gpus=resources.gpus)(
            RolloutWorker
        )
        slot.actor = remote.options(
            name=slot.name,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, slot.index),
            runtime_env={"env_vars": worker_environment(settings.device, settings.threads)},
        ).remote(self._folder, self._options, settings.device)
        call = slot.actor.start.remote(self._packed)
        self._jobs[call] = self._job(slot, _START, settings.start_deadline_s)

    def _send_gates(self, slot: _Slot) -> None:
        call = slot.actor.update_gates.remote(self._packed)
        self._jobs[call] = self._job(slot, _SYNC, self._settings.sync_deadline_s)

    def _job(self, slot: _Slot, phase: str, limit_s: float, chunk: int | None = None) -> _Job:
        return _Job(slot, phase, limit_s, time.monotonic() + limit_s, chunk, self._stamp)

    def _free(self, rolling: Iterable[_Job]) -> list[_Slot]:
        """Workers with the current gates and nothing to do."""
        busy = {job.slot.index for job in [*self._jobs.values(), *rolling]}
        return [slot for slot in self._slots if slot.index not in busy]

    def _settle(self, job: _Job, answer: Any) -> None:
        """A worker has started or taken gates: is it like the others?"""
        slot, facts = job.slot, job.slot.facts
        if job.phase == _START:
            facts, answer = answer
            if self._model is None:
                self._model = facts.model
            if facts.model != self._model:
                raise FleetFailure(
                    f"{slot.name} on {facts.host} has another model than the others in {self._folder}; "
                    f"give every node the same files"
                )
        current: GateStamp = self._stamp or answer  # before the first sync: what the folder holds
        self._stamp, sent = current, job.sent or current
        if answer != sent:
            raise FleetFailure(
                f"{slot.name} reports gate version {answer.version} ({answer.digest[:12]}) after version "
                f"{sent.version} ({sent.digest[:12]}) was sent; do not trust what it rolls"
            )
        slot.facts = facts
        if sent != current:  # the gates changed while it started
            self._send_gates(slot)

    def _next(self, rolling: dict[Any, _Job]) -> tuple[_Job, Any, str | None]:
        """(job, its answer, None) of the next call that ends, or (job, None, why) if its worker died."""
        jobs = self._jobs | rolling
        late = min(jobs.values(), key=lambda job: job.ends)
        wait_s = max(0.0, late.ends - time.monotonic())
        ready, _ = ray.wait(list(jobs), num_returns=1, timeout=wait_s)
        if not ready:
            raise FleetFailure(
                f"{late.slot.name} did not finish its {late.phase} within {late.limit_s:.0f} s"
            )
        job = jobs[ready[0]]
        self._jobs.pop(ready[0], None)
        rolling.pop(ready[0], None)
        try:
            return job, ray.get(ready[0], timeout=job.limit_s), None
        except RayTaskError as error:
            cause = error.cause
            raise WorkerError(
                f"{job.slot.name}, {job.phase}: {type(cause).__name__}: {cause}"
            ) from error
        except RayError as error:
            first = next(iter(str(error).strip().splitlines()), "")
            return job, None, f"{type(error).__name__}: {first}"

    def _replace(self, slot: _Slot, phase: str, death: str) -> None:
        """Another worker in the slot of a dead one, with the current gates."""
        if self._replacements == self._settings.max_replacements:
            raise FleetFailure(
                f"{slot.name} died in its {phase} ({death}), after {self._replacements} replacements of dead "
                f"workers, which is max_replacements"
            )
        self._replacements += 1
        self.figures.replacements += 1
        ray.kill(slot.actor)  # a worker that is merely out of reach must not come back
        dead, slot.life = slot.name, slot.life + 1
        self._begin(slot)
        self._say(f"{dead} died in its {phase} ({death}); {slot.name} takes its place")
