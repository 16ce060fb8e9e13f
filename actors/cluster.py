"""The Ray cluster a command runs on: the one it was submitted to, or one of its own on this machine."""

from __future__ import annotations

import math
import os

import ray


def connect(cpus: float) -> None:
    """Attach to the cluster named by RAY_ADDRESS (a submitted job has it), else start a local one.

    A local cluster is given all CPUs that are asked for, so that a laptop can run more actors than it has cores,
    slowly.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        num_cpus=max(math.ceil(cpus), os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
