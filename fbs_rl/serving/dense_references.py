"""What the dense pass says of a question: its own continuation and the NLLs of given tokens, each found once.

A question is asked alone, in an engine that does nothing else, so what is kept here is to the bit what would be
found again: products of other batch sizes differ in their last bits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fbs_rl.rl.rollout import RolloutSettings, RolloutTask
from fbs_rl.seeds import stable_hash
from fbs_rl.serving.client import score
from fbs_rl.serving.rollout_work import RolloutWork

if TYPE_CHECKING:
    from vllm import LLM

LIMIT_TOKENS = 2_000_000
"""Of all kept continuations and NLLs together: 16 MB."""


@dataclass(slots=True)
class DenseReferences:
    """request_keys: an endless supply of new ones. The entries used longest ago go first.

    What is kept holds for the weights that the engine has: call `forget` when previews change.
    """

    llm: LLM
    request_keys: Iterator[str]
    limit_tokens: int = LIMIT_TOKENS
    _work: RolloutWork = field(default_factory=RolloutWork)
    _kept: OrderedDict[bytes, np.ndarray] = field(default_factory=OrderedDict)
    _tokens: int = 0

    @property
    def tokens(self) -> int:
        """Kept, over all entries."""
        return self._tokens

    def take_work(self) -> RolloutWork:
        """Since it was last asked."""
        work, self._work = self._work, RolloutWork()
        return work

    def forget(self) -> None:
        self._kept.clear()
        self._tokens = 0

    def nll(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        """NLLs [N] of these tokens behind the prompt with nothing skipped, float64, nats."""
        key = _key("nll", prompt_ids, token_ids)
        return self._find(key, lambda: self._score(prompt_ids, token_ids)).copy()

    def continuation(self, task: RolloutTask, settings: RolloutSettings) -> tuple[int, ...]:
        """What the dense model answers; sampled, it is a function of the question's id and prompt."""
        drawn = f"{settings.temperature!r} {task.question_id}" if settings.temperature else "greedy"
        purpose = f"continuation {settings.max_new_tokens} {drawn}"
        key = _key(purpose, task.prompt_ids, sorted(settings.end_ids))
        found = self._find(key, lambda: self._continue(task, settings))
        return tuple(found.tolist())

    def _find(self, key: bytes, make: Callable[[], np.ndarray]) -> np.ndarray:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
            self._work += RolloutWork(reused_tokens=len(found))
            return found
        found = make()
        self._kept[key] = found
        self._tokens += len(found)
        while self._tokens > self.limit_tokens and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._tokens -= len(oldest)
        return found

    def _score(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
        self._work += RolloutWork(scored_tokens=len(token_ids), prompt_tokens=len(prompt_ids))
        options = {"gates": "dense", "request_key": next(self.request_keys)}
        return score(self.llm, [(prompt_ids, token_ids)], [options])[0].nll_N

    def _continue(self, task: RolloutTask, settings: RolloutSettings) -> np.ndarray:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=settings.max_new_tokens, temperature=settings.temperature,
            seed=stable_hash("dense continuation", task.question_id),
            stop_token_ids=list(settings.end_ids), ignore_eos=True, detokenize=False,
            extra_args={"gates": "dense"},
        )  # fmt: skip
        made = self.llm.generate(
            [{"prompt_token_ids": list(task.prompt_ids)}], params, use_tqdm=False
        )
        tokens = np.array(made[0].outputs[0].token_ids, np.int64)
        prompt = len(task.prompt_ids)
        self._work += RolloutWork(generated_tokens=len(tokens), prompt_tokens=prompt)
        return tokens


def _key(purpose: str, *sequences: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(purpose.encode(), digest_size=20)
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, np.int64).tobytes())
    return digest.digest()
