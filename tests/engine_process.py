"""A process of its own for tests that start vLLM engines: vLLM changes the process that it is imported into."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

Made = TypeVar("Made")
_LIMIT_S = 400


@contextmanager
def engine_process() -> Iterator[Callable[..., Any]]:
    """Gives a function that runs another one over there, with whatever it raises."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_settle) as pool:
        yield lambda function, *a, **k: pool.submit(function, *a, **k).result(_LIMIT_S)


def _settle() -> None:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS="1",
    )
