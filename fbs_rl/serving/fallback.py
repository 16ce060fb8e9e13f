"""Texts that must pass a check: requests with `validate` are made again, skipping less, until their text does.

Checks read what was generated, without the prompt. Over HTTP this happens inside the engine's client, so
every endpoint has it; in Python call `generate`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm import RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from fbs_rl.decode.safety import VALIDATORS, SafetyCounts, Validator, tau_ladder
from fbs_rl.serving.admission import Admission
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.serving.step_stats import fallback_counters
from fbs_rl.types import GateMode

if TYPE_CHECKING:
    from vllm import LLM

logger = init_logger(f"vllm.{__name__}")
_WHOLE = ("stop", "length")  # how a text ends that nobody cut short


def gate_ladder(options: RequestOptions) -> tuple[dict[str, Any], ...]:
    """What to change in a request's options for each attempt in turn, loosest first.

    Thresholds go up the ladder of fbs_rl.decode.safety; sampled gates have no tau, so their only stricter
    setting is dense; what is dense already is made once.
    """
    dense = {"gates": str(GateMode.DENSE)}
    if options.mode is GateMode.THRESHOLD:
        rungs = tau_ladder(options.tau, options.reruns)
        return tuple(dense if t is None else {"gates": str(options.mode), "tau": t} for t in rungs)
    again = options.mode is GateMode.SAMPLE and options.reruns > 0
    return ({}, dense) if again else ({},)


@dataclass(slots=True)
class Attempts:
    """One request with a check: what to send each time, and what was wrong with the texts that came back.

    rungs: parameters of each attempt. errors: of the attempts made so far (None: it passed).
    """

    check: Validator
    rungs: list[SamplingParams]
    errors: list[str | None] = field(default_factory=list)

    @classmethod
    def of(cls, params: SamplingParams, options: RequestOptions) -> Attempts:
        """Raises KeyError for options without `validate`."""
        given = {k: v for k, v in (params.extra_args or {}).items() if k not in ("validate", "reruns")}  # fmt: skip
        rungs = []
        for change in gate_ladder(options):
            rung = params.clone()
            rung.extra_args = {**given, **change}
            rung.output_kind = RequestOutputKind.FINAL_ONLY
            rungs.append(rung)
        return cls(VALIDATORS[options.validate or ""], rungs)

    def judge(self, output: RequestOutput) -> bool:
        """Whether another attempt is due after this one."""
        text = output.outputs[0]
        if text.finish_reason not in _WHOLE:
            return False  # the engine gave the request up, which is not the gates' fault
        self.errors.append(self.check(text.text))
        if self.errors[-1] is None or len(self.errors) == len(self.rungs):
            return False
        after = self.rungs[len(self.errors)].extra_args or {}
        stricter = after["gates"] if "tau" not in after else f"tau {after['tau']:g}"
        logger.info("request %s is made again with %s: %s", output.request_id, stricter, self.errors[-1])  # fmt: skip
        return True

    def count(self) -> None:
        """Add the request to this process's counters."""
        if self.errors:
            fallback_counters().add(SafetyCounts.of((), self.errors))


# --- vllm.LLM -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """The last attempt's output. errors: of all attempts in turn, empty for a request without `validate`."""

    output: RequestOutput
    errors: tuple[str | None, ...] = ()


def generate(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]
) -> list[Answer]:
    """LLM.generate with checks: each round makes the failed texts again, in one batch.

    Raises ValueError for options that cannot work, and for another number of params than prompts.
    """
    admission = Admission.of(llm.llm_engine.vllm_config)
    if admission is None:
        raise ValueError("this engine serves no FBS model; call its own generate")
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(each)} params; give one, or one each")
    options = [admission.admit(given) for given in each]
    checked = {
        i: Attempts.of(p, o) for i, (p, o) in enumerate(zip(each, options, strict=True)) if o.validate
    }  # fmt: skip
    outputs: dict[int, RequestOutput] = {}
    due = list(range(len(prompts)))
    while due:
        sent = [checked[i].rungs[len(checked[i].errors)] if i in checked else each[i] for i in due]
        made = llm.generate([prompts[i] for i in due], sent, use_tqdm=False)
        outputs.update(zip(due, made, strict=True))
        due = [i for i in due if i in checked and checked[i].judge(outputs[i])]
    for attempts in checked.values():
        attempts.count()
    errors = {i: tuple(attempts.errors) for i, attempts in checked.items()}
    return [Answer(outputs[i], errors.get(i, ())) for i in range(len(prompts))]


# --- AsyncLLM, which answers HTTP ---------------------------------------------------------------------


@functools.cache  # once in a process
def watch_texts() -> None:
    """Have this process's AsyncLLMs check texts, those of FBS models.

    Options are read at the call, so that a mistake is an HTTP error even for a stream, which has begun with
    200 by the time that it is read from.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    plain: Any = AsyncLLM.generate

    @functools.wraps(plain)
    def generate(
        self: AsyncLLM, prompt: Any, sampling_params: SamplingParams, request_id: str, **named: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        admission = Admission.of(self.vllm_config)
        if admission is None:
            return plain(self, prompt, sampling_params, request_id, **named)
        try:
            options = admission.admit(sampling_params)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        if options.validate is None:
            return plain(self, prompt, sampling_params, request_id, **named)
        if isinstance(prompt, AsyncGenerator):
            raise VLLMValidationError(
                "validate makes a text again, but a streamed prompt comes only once; leave validate out"
            )
        attempts = Attempts.of(sampling_params, options)
        return _until_valid(attempts, lambda p: plain(self, prompt, p, request_id, **named))

    AsyncLLM.generate = generate  # pyright: ignore[reportAttributeAccessIssue]


async def _until_valid(
    attempts: Attempts, make: Callable[[SamplingParams], AsyncGenerator[RequestOutput, None]]
) -> AsyncGenerator[RequestOutput, None]:
    """The last attempt's output, whole: what is streamed cannot be taken back."""
    kept: RequestOutput | None = None
    for params in attempts.rungs:
        async with aclosing(make(params)) as outputs:
            async for output in outputs:
                kept = output
        if kept is None or not attempts.judge(kept):
            break
    attempts.count()
    if kept is not None:
        yield kept
