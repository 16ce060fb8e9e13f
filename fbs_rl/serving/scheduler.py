"""vLLM's scheduler with a prefix cache that holds prompts only.

A prompt never skips, so its blocks mean the same to every request; blocks with tokens at which gates acted
depend on who skipped what, and vLLM knows blocks by their tokens alone.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _PromptBlocks:
    """Enters no block into the prefix cache that holds tokens at which gates may act."""

    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator: Any = self.kv_cache_manager.coordinator
        plain = coordinator.cache_blocks

        def cache_blocks(request: Any, num_computed_tokens: int, *more: Any, **named: Any) -> Any:
            return plain(request, min(num_computed_tokens, dense_tokens(request)), *more, **named)

        coordinator.cache_blocks = cache_blocks

    def add_request(self, request: Any) -> None:
        if dense_tokens(request) < request.num_prompt_tokens:
            # Its prompt skips, so it may not start from blocks of one that did not.
            request.skip_reading_prefix_cache = True
        parent: Any = super()
        parent.add_request(request)


class FBSScheduler(_PromptBlocks, Scheduler):
    """Of steps that wait for each other."""


class FBSAsyncScheduler(_PromptBlocks, AsyncScheduler):
    """Of steps that are prepared while the one in front runs."""


def dense_tokens(request: Any) -> int:
    """How many of a request's first tokens no gate can act on."""
    params = request.sampling_params
    start = None if params is None else (params.extra_args or {}).get("decode_start")
    return request.num_prompt_tokens if start is None else min(start, request.num_prompt_tokens)
