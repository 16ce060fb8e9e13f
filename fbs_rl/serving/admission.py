"""Reading a request's gate options where it enters an engine, so that a mistake is an answer and not a crash.

vLLM lets a logits processor check a request's parameters; ours do nothing else. One process may hold several
engines, so each has a class of its own, found by name in this module.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.types import GateMode


@dataclass(frozen=True, slots=True)
class Admission:
    """What an engine can do for a request. has_text: it has a tokenizer."""

    config: FBSConfig
    settings: ServingSettings
    has_text: bool

    @classmethod
    def of(cls, vllm_config: Any) -> Admission | None:
        """That of an engine; None if its model is another one."""
        model = vllm_config.model_config
        if not isinstance(model.hf_config, FBSConfig):
            return None
        return cls(model.hf_config, ServingSettings.of(vllm_config), not model.skip_tokenizer_init)

    def admit(self, params: SamplingParams) -> RequestOptions:
        """The request's options; ValueError, in one sentence, for those that cannot work."""
        options = RequestOptions.parse(params.extra_args, self.config)
        if options.mode is GateMode.SAMPLE and self.settings.consensus:
            raise ValueError(
                'gates is "sample", but this engine decides for all rows at once (batch "consensus"); '
                'ask for "threshold" or "dense"'
            )
        reads = [name for name in ("protect_structure", "validate") if getattr(options, name)]
        if reads and not self.has_text:
            raise ValueError(
                f"{reads[0]} reads the text, but this engine was started without a tokenizer "
                f"(skip_tokenizer_init); leave one of the two out"
            )
        if options.validate and (params.n != 1 or not params.detokenize):
            odd = f"n is {params.n}" if params.n != 1 else "detokenize is off"
            raise ValueError(
                f"validate checks the one text of a request, but {odd}; leave one of the two out"
            )
        return options


class AdmissionCheck(LogitsProcessor):
    """Checks extra_args; changes no logits. admission: None in processes that admit nobody."""

    admission: ClassVar[Admission | None] = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """ValueError, in one sentence, for options that cannot work; HTTP answers it with 400."""
        if cls.admission is None:
            return
        if cls.admission.admit(sampling_params).validate:
            # What checks texts (fbs_rl.serving.fallback) takes this option out of what it sends on.
            raise ValueError(
                "validate does nothing in LLM.generate; call fbs_rl.serving.fallback.generate(llm, prompts, params)"
            )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None: ...

    def apply(self, logits: Tensor) -> Tensor:
        return logits


_PREFIX = "AdmissionCheck_"
_engines: dict[str, Admission] = {}


def admission_check(engine: str, admission: Admission) -> str:
    """The name under which vLLM finds the check of this engine."""
    name = f"{_PREFIX}{engine}"
    _engines[name] = admission
    return f"{__name__}:{name}"


def __getattr__(name: str) -> type[AdmissionCheck]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (AdmissionCheck,), {"admission": _engines.get(name)})


@functools.cache  # once in a process
def check_prompts() -> None:
    """Have options that depend on the prompt checked in this process: vLLM has no place for it."""
    plain = InputProcessor.process_inputs

    @functools.wraps(plain)
    def process_inputs(self: Any, *args: Any, **named: Any) -> Any:
        request = plain(self, *args, **named)
        admission = Admission.of(self.vllm_config)
        if admission is None or request.sampling_params is None or request.prompt_token_ids is None:
            return request
        options = RequestOptions.parse(request.sampling_params.extra_args, admission.config)
        try:
            options.check_prompt(len(request.prompt_token_ids))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        return request

    InputProcessor.process_inputs = process_inputs
