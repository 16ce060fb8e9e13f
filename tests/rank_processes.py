"""Ranks as plain processes: real DeepSpeed engines over gloo, without a Ray cluster to start.

They are forked from a server that has imported everything already, so a gang costs a second, not ten.
"""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from actors.pretrain_worker import PretrainWorker
from fbs_rl.config import to_tree
from fbs_rl.training.settings import PretrainSettings

Made = TypeVar("Made")
Task = Callable[..., Made]
"""Called as task(worker, join, *arguments); join(step, resume) starts the worker."""
_DEADLINE_S = 600

_server = multiprocessing.get_context("forkserver")
# The last one compiles functions as it is imported, which takes seconds; ZeRO stages 1 and 2 import it.
_server.set_forkserver_preload(
    ["tests.rank_processes", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


def run_ranks(settings: PretrainSettings, task: Task[Made], *arguments: Any) -> list[Made]:
    """What `task` returns on each of cluster.ranks ranks. Raises RuntimeError with a rank's own traceback."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(settings.cluster.ranks):
        mine, theirs = _server.Pipe(duplex=False)
        process = _server.Process(
            target=_rank, args=(theirs, rank, settings, port, task, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = [_receive(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [result for result, _ in answers]


def _receive(pipe: Connection) -> tuple[Any, str | None]:
    if not pipe.poll(_DEADLINE_S):
        return None, f"no answer within {_DEADLINE_S} s"
    return pipe.recv()


def _rank(
    pipe: Connection,
    rank: int,
    settings: PretrainSettings,
    port: int,
    task: Task[Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        worker = PretrainWorker(rank, settings.cluster.ranks, to_tree(settings))

        def join(step: int = 0, resume: dict[str, Any] | None = None) -> PretrainWorker:
            worker.start("127.0.0.1", port, step, resume)
            return worker

        pipe.send((task(worker, join, *arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
