"""A gang: as many workers as ranks, in one placement group, that live and die together.

Nothing waits without a deadline. The first rank that fails ends the call; what the others were waiting
for in a collective will never come, so the caller kills the gang and starts another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class GangFailure(RuntimeError):
    """A rank died, or a deadline passed. The work can go on from the last checkpoint."""


class NoRoom(GangFailure):
    """The cluster had no room for all ranks within the deadline."""


class WorkerError(RuntimeError):
    """A rank raised an error of its own; starting again would meet it again."""


@dataclass(frozen=True, slots=True)
class RankResources:
    """What one rank takes of the cluster."""

    cpus: float
    gpus: float = 0

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(slots=True)
class Gang:
    """The running workers, by rank."""

    name: str
    workers: list[Any]
    group: PlacementGroup

    @classmethod
    def gather(
        cls,
        name: str,
        worker: type,
        ranks: int,
        resources: RankResources,
        arguments: tuple[Any, ...],
        deadline_s: float,
        environment: dict[str, str] | None = None,
    ) -> Gang:
        """Start `ranks` actors of the plain class `worker`, made with (rank, ranks, *arguments).

        Raises NoRoom if the cluster has no room for them within the deadline.
        """
        group = placement_group([resources.bundle] * ranks, strategy="PACK")
        # A node that has just died still counts as room, so the group may never become ready.
        if not group.wait(deadline_s):
            remove_placement_group(group)
            have = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
            raise NoRoom(
                f"{name}: no room for {ranks} ranks of {resources.bundle} within {deadline_s:.0f} s; "
                f"the cluster has {have}"
            )
        remote = ray.remote(max_restarts=0, num_cpus=resources.cpus, num_gpus=resources.gpus)(
            worker
        )
        workers = [
            remote.options(
                name=f"{name}-{rank}-{time.time_ns()}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                runtime_env={"env_vars": environment or {}},
            ).remote(rank, ranks, *arguments)
            for rank in range(ranks)
        ]
        return cls(name, workers, group)

    def call(
        self, method: str, *arguments: Any, deadline_s: float, each: Sequence[tuple] | None = None
    ) -> list[Any]:
        """Call `method` on every rank at once; the results by rank.

        each: further arguments by rank. Raises GangFailure for a dead rank or a missed deadline, WorkerError
        for an error that a rank raised.
        """
        extra = each or [()] * len(self.workers)
        pending = {
            getattr(worker, method).remote(*arguments, *more): rank
            for rank, (worker, more) in enumerate(zip(self.workers, extra, strict=True))
        }
        results: dict[int, Any] = {}
        ends = time.monotonic() + deadline_s
        while pending:
            ready, _ = ray.wait(
                list(pending), num_returns=1, timeout=max(0.0, ends - time.monotonic())
            )
            if not ready:
                late = sorted(pending.values())
                raise GangFailure(
                    f"{self.name}: ranks {late} did not finish {method} within {deadline_s:.0f} s"
                )
            rank = pending.pop(ready[0])
            results[rank] = self._result(ready[0], rank, method)
        return [results[rank] for rank in range(len(self.workers))]

    def _result(self, reference: Any, rank: int, method: str) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if _comes_from_a_dead_peer(error):
                raise GangFailure(
                    f"{self.name}: rank {rank} lost a peer during {method}"
                ) from error
            raise WorkerError(f"rank {rank}, {method}: {type(cause).__name__}: {cause}") from error
        except (ActorDiedError, RayActorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise GangFailure(
                f"{self.name}: rank {rank} died during {method} ({reason})"
            ) from error
        except (GetTimeoutError, RayError) as error:
            raise GangFailure(
                f"{self.name}: rank {rank}, {method}: {type(error).__name__}"
            ) from error

    def disband(self) -> None:
        """Kill all ranks and give their room back."""
        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.group)


def _comes_from_a_dead_peer(error: RayTaskError) -> bool:
    """A collective that breaks because the other side is gone raises before Ray notices the death."""
    text = str(error)
    marks = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
    return any(mark in text for mark in marks)
