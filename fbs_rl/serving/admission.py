"""Reading a request's gate options where it enters an engine, so that a mistake is an answer and not a crash.

vLLM lets a logits processor check a request's parameters; these do nothing else. One process may hold
several engines, so each has a class of its own, found by name in this module.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.types import GateMode

_PREFIX = "AdmissionCheck_"
_engines: dict[str, tuple[FBSConfig, ServingSettings]] = {}


class AdmissionCheck(LogitsProcessor):
    """Checks extra_args; changes no logits. engine: None in processes that admit nobody."""

    engine: ClassVar[tuple[FBSConfig, ServingSettings] | None] = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """ValueError, in one sentence, for options that cannot work; HTTP answers it with 400."""
        if cls.engine is None:
            return
        config, settings = cls.engine
        options = RequestOptions.parse(sampling_params.extra_args, config)
        if options.mode is GateMode.SAMPLE and settings.consensus:
            raise ValueError(
                'gates is "sample", but this engine decides for all rows at once (batch "consensus"); '
                'ask for "threshold" or "dense"'
            )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None: ...

    def apply(self, logits: Tensor) -> Tensor:
        return logits


def admission_check(engine: str, config: FBSConfig, settings: ServingSettings) -> str:
    """The name under which vLLM finds the check of this engine."""
    name = f"{_PREFIX}{engine}"
    _engines[name] = (config, settings)
    return f"{__name__}:{name}"


def __getattr__(name: str) -> type[AdmissionCheck]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (AdmissionCheck,), {"engine": _engines.get(name)})
