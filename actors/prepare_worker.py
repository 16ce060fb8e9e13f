"""Data preparation on a Ray cluster: the tasks of fbs_rl.data.worker_pool as Ray tasks.

Inputs and the output folder must be on storage that every node sees under the same path.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from fbs_rl.data.worker_pool import TASK_DEADLINE_S, Done, peak_rss_bytes

_RETRIES = 3
"""Tasks are idempotent, so Ray may repeat one whose node was lost."""
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@ray.remote(num_cpus=1, max_retries=_RETRIES)
def _run(function: Callable[[Any], Any], task: Any) -> tuple[Any, int]:
    return function(task), peak_rss_bytes()


def _small_cluster(count: int | None) -> dict[str, Any]:
    return {"include_dashboard": False} | ({"num_cpus": count} if count else {})


class RayPool:
    """At most `count` tasks at a time (default: one for each CPU) on the cluster at `address`.

    The address "local" starts a cluster on this machine. Raises ConnectionError when there is none. A cluster
    that this process is connected to already is used as it is, and left running.
    """

    def __init__(self, count: int | None = None, address: str | None = None) -> None:
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(
                    address=address or "auto",
                    runtime_env={"env_vars": _ONE_THREAD},
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **(_small_cluster(count) if address == "local" else {}),
                )
            except ConnectionError as error:
                raise ConnectionError(
                    f"there is no Ray cluster at {address or 'RAY_ADDRESS or this machine'}; "
                    f"start one with `ray start --head`, or give --ray-address local"
                ) from error
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus < 1:
            self.close()
            raise ConnectionError(
                "the Ray cluster has no CPU to run tasks on; add a node with some"
            )
        self._count = count or cpus

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Done]:
        """Results as they come. Raises what a task raised, TimeoutError when nothing finishes in time."""
        waiting = deque(enumerate(tasks))
        running: dict[Any, int] = {}
        last_s = time.monotonic()
        while waiting or running:
            while waiting and len(running) < self._count:
                number, task = waiting.popleft()
                running[_run.remote(function, task)] = number
            ready, _ = ray.wait(list(running), num_returns=1, timeout=60.0)
            if not ready and time.monotonic() - last_s > TASK_DEADLINE_S:
                raise TimeoutError(
                    f"no Ray task has finished for {TASK_DEADLINE_S:.0f} s (task {min(running.values())} "
                    f"is the first of those running); look at `ray status`, then run the same command to continue"
                )
            for reference in ready:
                last_s = time.monotonic()
                yield self._result(running.pop(reference), reference)

    def _result(self, number: int, reference: Any) -> Done:
        try:
            returned, peak = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error  # what the task itself raised, which is what users understand
        except WorkerCrashedError as error:
            raise ChildProcessError(
                f"a Ray worker died {_RETRIES + 1} times at task {number}; run the same command to continue"
            ) from error
        return Done(number, returned, peak)

    def close(self) -> None:
        if self._ours and ray.is_initialized():
            ray.shutdown()
