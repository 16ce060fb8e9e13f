"""Tasks on local processes.

Workers are started afresh (spawn), never forked: the tokenizer library runs threads, and a fork of a process
with threads can hang. A worker that dies is an error that names its task; the finished tasks stay finished.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, cast

TASK_DEADLINE_S = 6 * 3600.0
"""A task that takes longer counts as hung. The longest are compressed files, which cannot be divided."""
_STOP_WITHIN_S = 5.0
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Done:
    """A finished task's number, what it returned, and the peak memory of the process that ran it."""

    number: int
    returned: Any
    peak_rss_bytes: int


class Pool(Protocol):
    """Where tasks run."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Done]:
        """Run `function` on every task; results come as they are ready. Raises what a task raised."""
        ...

    def close(self) -> None:
        """Stop whatever still runs."""
        ...


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class InlinePool:
    """Tasks one after another in this process."""

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Done]:
        for number, task in enumerate(tasks):
            yield Done(number, function(task), peak_rss_bytes())

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Any  # our end of a pipe
    number: int | None = None  # the task it works on
    since_s: float = 0.0


class LocalPool:
    """Tasks on `count` processes of this machine, kept from one `run` to the next."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._workers: list[_Worker] = []

    def run(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Done]:
        """Raises ChildProcessError for a worker that died, TimeoutError for one that hangs."""
        waiting = deque(enumerate(tasks))
        while len(self._workers) < min(self._count, len(tasks)):
            self._workers.append(_start())
        for worker in self._workers:
            _feed(worker, function, waiting)
        while any(worker.number is not None for worker in self._workers):
            for worker in self._ready():
                done = _receive(worker)
                _feed(worker, function, waiting)
                yield done

    def _ready(self) -> list[_Worker]:
        """Busy workers that have something to say, or are dead."""
        busy = {worker.connection: worker for worker in self._workers if worker.number is not None}
        oldest = min(worker.since_s for worker in busy.values())
        left_s = max(0.0, oldest + TASK_DEADLINE_S - time.monotonic())
        ready = wait(list(busy), timeout=left_s)
        if not ready:
            raise TimeoutError(
                f"a worker has been busy with one task for {TASK_DEADLINE_S:.0f} s and counts as hung; "
                f"run the same command to continue"
            )
        return [busy[connection] for connection in cast(list[Any], ready)]

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_STOP_WITHIN_S)
            if worker.process.is_alive():
                worker.process.kill()
            worker.connection.close()
        self._workers.clear()


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return _Worker(process, ours)


def _feed(worker: _Worker, function: Callable[[Any], Any], waiting: deque[tuple[int, Any]]) -> None:
    worker.number = None
    if waiting:
        worker.number, task = waiting.popleft()
        worker.since_s = time.monotonic()
        try:
            worker.connection.send((function, task))
        except OSError as error:  # it died while it had nothing to do
            raise _died(worker) from error


def _receive(worker: _Worker) -> Done:
    assert worker.number is not None
    try:
        returned, error, peak = worker.connection.recv()
    except (EOFError, ConnectionResetError) as error:
        raise _died(worker) from error
    if error is not None:
        raise error
    return Done(worker.number, returned, peak)


def _died(worker: _Worker) -> ChildProcessError:
    worker.process.join(_STOP_WITHIN_S)
    code = worker.process.exitcode
    reason = f"exit code {code}"
    if code is not None and code < 0:
        reason = (
            f"{signal.Signals(-code).name}{', perhaps for want of memory' if code == -9 else ''}"
        )
    return ChildProcessError(
        f"a worker process died at task {worker.number} ({reason}); run the same command to continue, "
        f"with fewer workers if memory is short"
    )


def _serve(connection: Any) -> None:
    """A worker's life: tasks in, results out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"), TOKENIZERS_PARALLELISM="false")
    while True:
        try:
            function, task = connection.recv()
        except EOFError:
            return
        returned, failure = None, None
        try:
            returned = function(task)
        except Exception as error:  # the boundary: whatever it is, the parent raises it
            failure = _portable(error)
        try:
            connection.send((returned, failure, peak_rss_bytes()))
        except BrokenPipeError:
            return


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the journey, with its traceback as a note; else its words."""
    words = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # errors of compiled libraries often cannot be pickled
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{words}")
    return error
