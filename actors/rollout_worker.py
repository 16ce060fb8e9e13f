"""One rollout engine in a process of its own: a plain class, which the fleet makes a Ray actor.

A worker has no state but its gates and what they imply, so another one can take its place at any time.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fbs_rl.gate_bundle import GateBundle
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask
from fbs_rl.serving.engine_options import EngineOptions, folder_digest
from fbs_rl.serving.rollout_work import RolloutWork

if TYPE_CHECKING:
    from fbs_rl.serving.rollouts import RolloutEngine

_PROTOCOL = 4
"""Of pickle: arrays arrive as memory of their own, not as views that keep Ray's object store full."""


@dataclass(frozen=True, slots=True)
class GateStamp:
    """Which gates a worker has. digest: over the tensors, as in GateBundle."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """model: digest of configuration and weights in the folder. versions: of packages."""

    host: str
    pid: int
    model: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class RolledChunk:
    """episodes: pickled list[EpisodeRollout]. work: what they took."""

    episodes: bytes
    work: RolloutWork

    def unpack(self) -> list[EpisodeRollout]:
        return pickle.loads(self.episodes)


def worker_environment(device: str, threads: int) -> dict[str, str]:
    """What must be in a process's environment before it imports vLLM. device: "cpu" or "cuda"."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f'the device is {device!r}; rollout workers run on "cpu" or "cuda"')
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives and dies with its actor
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    # Workers of one host must not all bind to its first cores.
    return environment | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if device == "cpu" else {})


class RolloutWorker:
    """Nothing runs before `start`, so that what is wrong with a model is an error of a call."""

    def __init__(self, folder: str, options: EngineOptions, device: str) -> None:
        self._folder, self._options, self._device = folder, options, device
        self._engine: RolloutEngine | None = None
        self._facts: WorkerFacts | None = None

    def start(self, packed: bytes | None = None) -> tuple[WorkerFacts, GateStamp]:
        """Start the engine, with these gates in place of the folder's own.

        Raises ValueError for a folder that cannot be rolled, RuntimeError without the device.
        """
        digest = folder_digest(self._folder)

        from vllm.platforms import current_platform

        from fbs_rl.serving.rollouts import RolloutEngine

        if (self._device == "cuda") != current_platform.is_cuda():
            raise RuntimeError(
                f"the fleet's device is {self._device}, but vLLM on {socket.gethostname()} runs on "
                f"{current_platform.device_type}; install vLLM for that device, or change the fleet's"
            )
        self._engine = RolloutEngine.start(self._folder, self._options)
        self._facts = WorkerFacts(socket.gethostname(), os.getpid(), digest, _versions())
        return self._facts, (self.stamp() if packed is None else self.update_gates(packed))

    def facts(self) -> WorkerFacts:
        assert self._facts is not None, "start() comes first"
        return self._facts

    def stamp(self) -> GateStamp:
        engine = self._started()
        return GateStamp(engine.version, engine.digest)

    def update_gates(self, packed: bytes) -> GateStamp:
        """Version and digest that the engine reports after it; ValueError for gates that do not fit."""
        self._started().update_gates(GateBundle.unpack(packed))
        return self.stamp()

    def roll(
        self, chunk: Sequence[RolloutTask], settings: RolloutSettings, expected_version: int
    ) -> RolledChunk:
        """Errors as RolloutEngine.roll; RuntimeError under gates of another version."""
        engine = self._started()
        if engine.version != expected_version:
            raise RuntimeError(
                f"rollouts under gate version {expected_version} were asked for, but this worker has "
                f"{engine.version}; sync the fleet first"
            )
        before, engine.work = engine.work, RolloutWork()
        try:
            episodes = engine.roll(chunk, settings)
            return RolledChunk(pickle.dumps(episodes, _PROTOCOL), engine.work)
        finally:
            engine.work = before + engine.work

    def throughput(self) -> RolloutWork:
        """Of all rollouts so far."""
        return self._started().work

    def _started(self) -> RolloutEngine:
        assert self._engine is not None, "start() comes first"
        return self._engine


def _versions() -> dict[str, str]:
    import ray
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "ray": ray.__version__}
