"""What the process of one rank is, whatever it trains: its device, where it meets the others, what it takes."""

from __future__ import annotations

import datetime
import logging
import os
import resource
import socket
import sys
from typing import Any

import torch


def rank_device(key: str, wanted: str) -> torch.device:
    """The device of this process; ValueError where setting `key` wants cuda and there is none. wanted: or cpu, auto."""
    use_cuda = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not use_cuda:
        raise ValueError(f"{key} is cuda, but torch finds no CUDA device on this node")
    return torch.device("cuda", 0) if use_cuda else torch.device("cpu")


def own_address() -> tuple[str, int]:
    """(host, free port) at which the other ranks can meet this one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    ray = sys.modules.get("ray")  # there only inside an actor
    return "127.0.0.1" if ray is None else ray.util.get_node_ip_address(), port


def meet_ranks(
    rank: int, ranks: int, host: str, port: int, device: torch.device, threads: int, deadline_s: float
) -> None:  # fmt: skip
    """Join the process group whose rank 0 is at host and port; no collective of it waits longer than deadline_s."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
        DS_ACCELERATOR=device.type,
        OMP_NUM_THREADS=str(threads),
    )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Building it takes a minute of C++ compilation and gains nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=datetime.timedelta(seconds=deadline_s),
        )


def place_facts(device: torch.device) -> dict[str, Any]:
    """Where this process runs: host, pid, name of the device."""
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu"
    return {"host": socket.gethostname(), "pid": os.getpid(), "device": name}


def memory_figures(device: torch.device) -> dict[str, float]:
    """Largest resident set and, on a GPU, largest allocation of this process so far, in GiB."""
    figures = {"perf/rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        figures["perf/gpu_gb"] = torch.cuda.max_memory_allocated() / 2**30
    return figures
