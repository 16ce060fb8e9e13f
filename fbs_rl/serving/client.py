"""What a program asks of an FBS engine beside text: traces, gate updates, scores of given answers.

For `vllm.LLM`, in process or with its engine in another one; a fleet's workers call the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fbs_rl.gate_bundle import GateBundle
from fbs_rl.gate_trace import GateTrace

if TYPE_CHECKING:
    from vllm import LLM


def take_traces(llm: LLM, keys: Sequence[str]) -> list[GateTrace]:
    """The traces of these request keys, in their order; each can be taken once.

    Raises ValueError for a key whose request is unknown or whose trace was dropped.
    """
    wires = _ask(llm, "fbs_take_traces", list(keys))
    return [GateTrace.from_wire(wire) for wire in wires]


def update_gates(llm: LLM, bundle: GateBundle) -> None:
    """Put new gates into the running engine, between two steps, and make sure that it has them.

    Where previews change, prompts cached before are void, so the prefix cache is emptied.
    Raises RuntimeError if the engine reports another version or digest than was sent.
    """
    found = _ask(llm, "fbs_update_gates", bundle.pack())
    if (found["version"], found["digest"]) != (bundle.version, bundle.digest):
        raise RuntimeError(
            f"the engine reports gate version {found['version']} ({found['digest'][:12]}) after version "
            f"{bundle.version} ({bundle.digest[:12]}) was sent; do not trust what it generates"
        )
    if any(".skip_gate." not in name for name in bundle.tensors):
        llm.reset_prefix_cache()


@dataclass(frozen=True, slots=True)
class Score:
    """A given continuation under the gates. nll_N: of its tokens, nats. trace: columns of all but the last."""

    nll_N: np.ndarray
    trace: GateTrace


def score(
    llm: LLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], options: Sequence[dict[str, Any]]
) -> list[Score]:  # fmt: skip
    """Score (prompt ids, continuation ids) in one batched call, gates acting behind the prompt.

    options: extra_args of each pair, with a request_key of its own each.
    Raises ValueError for an empty prompt or continuation, or options without a key.
    """
    from vllm import SamplingParams

    for (prompt, continuation), given in zip(pairs, options, strict=True):
        if not len(prompt) or not len(continuation):
            raise ValueError("a score needs a prompt and a continuation of at least one token each")
        if "request_key" not in given:
            raise ValueError("a score needs request_key in its options, to find its trace")
    params = [
        SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False,
            extra_args={**given, "decode_start": len(prompt)},
        )
        for (prompt, _), given in zip(pairs, options, strict=True)
    ]  # fmt: skip
    whole = [{"prompt_token_ids": [*prompt, *rest]} for prompt, rest in pairs]
    outputs = llm.generate(whole, params, use_tqdm=False)  # pyright: ignore[reportArgumentType]
    traces = take_traces(llm, [given["request_key"] for given in options])
    return [
        Score(_nll(output.prompt_logprobs, prompt, rest), trace.first(len(rest) - 1))
        for output, (prompt, rest), trace in zip(outputs, pairs, traces, strict=True)
    ]


def _nll(logprobs: Any, prompt: Sequence[int], continuation: Sequence[int]) -> np.ndarray:
    behind = logprobs[len(prompt) :]
    return np.array([-at[token].logprob for at, token in zip(behind, continuation, strict=True)])


def _ask(llm: LLM, method: str, *arguments: Any) -> Any:
    """What the engine's one worker answers."""
    return llm.collective_rpc(method, args=arguments)[0]
