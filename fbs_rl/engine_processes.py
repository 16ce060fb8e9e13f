"""Processes that each hold one vLLM engine for a bench: started, asked over a pipe, ended with their context."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any, TypeAlias

from fbs_rl.bench_engine import EngineFacts, EngineSpec, serve_engine

Channel: TypeAlias = (
    Any  # one end of a pipe: multiprocessing has a class of its own for each platform
)

_START_S = 1200.0  # compiling a model for stock vLLM takes minutes on a busy machine
_END_S = 30.0
SETTLED = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one core for all would be shared with whoever else is on it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def running(
    specs: Mapping[str, EngineSpec], threads: int
) -> Iterator[tuple[dict[str, Channel], dict[str, EngineFacts]]]:
    """The connections to started engines, and what they say of themselves, by name. They start side by side, for
    much of it is waiting. threads: of each. Raises OSError if one cannot start."""
    with ExitStack() as stack:
        channels = {
            name: stack.enter_context(_process(spec, threads)) for name, spec in specs.items()
        }
        facts = {
            name: answer(channel, name, "start", _START_S) for name, channel in channels.items()
        }
        yield channels, facts


@contextmanager
def _process(spec: EngineSpec, threads: int) -> Iterator[Channel]:
    ours, theirs = get_context("spawn").Pipe()
    with environment({**SETTLED, "OMP_NUM_THREADS": str(threads)}):
        process = get_context("spawn").Process(target=serve_engine, args=(theirs, spec))
        process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(_END_S)
        if process.is_alive():
            process.kill()


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """A new process reads them before it imports anything."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def answer(connection: Channel, engine: str, doing: str, limit_s: float) -> Any:
    """What the engine sends next. Raises OSError if that is a failure, or nothing in time."""
    if not connection.poll(limit_s):
        raise OSError(f"the engine {engine} did not {doing} within {limit_s:g} s")
    try:
        answer = connection.recv()
    except EOFError as error:
        raise OSError(f"the engine {engine} ended before it could {doing}") from error
    if isinstance(answer, str):
        raise OSError(f"the engine {engine} could not {doing}: {answer}")
    return answer
