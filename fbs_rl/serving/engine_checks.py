"""Engine options for an FBS model: defaults that are right for it, and one sentence for what cannot work."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from fbs_rl.decode.cuda_launcher import check_cuda
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.serving.admission import Admission, admission_check, check_prompts
from fbs_rl.serving.graph_branches import check_bindings
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.serving.step_stats import engine_file, fallback_counters, register_collector

logger = init_logger(f"vllm.{__name__}")

WORKER = "fbs_rl.serving.worker.FBSWorker"
EXTENSION = "fbs_rl.serving.http_calls.FBSHttpExtension"
_CALLS = "fbs_rl.serving.runner.FBSWorkerExtension"  # what any extension must have
SCHEDULER = "fbs_rl.serving.scheduler.FBSScheduler"
AHEAD = "fbs_rl.serving.scheduler.FBSAsyncScheduler"
_SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
_PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32")


class FBSEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls this with the configuration of an engine for an FBS model, once, before it starts anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        refuse(vllm_config)
        adjust(vllm_config)


# --- what cannot work ---------------------------------------------------------------------------------


def refuse(vllm_config: Any) -> None:
    """Raise ValueError, in one sentence, for the first option that an FBS model cannot be served with."""
    config: FBSConfig = vllm_config.model_config.hf_config
    if config.segment_position:
        raise ValueError(
            "this model adds segment positions (segment_position), which serving does not know; decode it "
            "with transformers"
        )
    _refuse_several_devices(vllm_config.parallel_config)
    for name, reason in _unsupported(vllm_config):
        raise ValueError(f"{name} cannot be used with an FBS model: {reason}; leave it out")
    _refuse_foreign_classes(vllm_config)


def _refuse_several_devices(parallel: Any) -> None:
    for kind in ("tensor", "pipeline", "decode_context", "prefill_context", "data"):
        name = f"{kind}_parallel_size"
        if getattr(parallel, name, 1) != 1:
            raise ValueError(
                f"{name} is {getattr(parallel, name)}, but an engine for an FBS model uses one device; start one "
                f"server for each device"
            )


def _unsupported(vllm_config: Any) -> Iterator[tuple[str, str]]:
    """Options that were given and cannot work, each with why."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    foreign = "it moves or shares keys and values, and some are missing where a token skipped"
    moves = vllm_config.kv_transfer_config or getattr(cache, "kv_offloading_size", None)
    halves = getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0)
    rules = [
        ("speculative decoding", vllm_config.speculative_config, "gates decide token by token"),
        ("a KV connector or KV offloading", moves, foreign),
        ("LoRA", vllm_config.lora_config, "adapters do not reach the layers' own modules"),
        ("dual-batch overlap", halves, "a step's plan is for the whole batch"),
        ("a quantised KV cache", cache.cache_dtype not in _PLAIN_CACHES, "its layers write 16 or 32 bits"),
        ("quantised weights", model.quantization, "no test covers them"),
        ("sliding-window attention", cache.sliding_window, "its layers read the whole cache"),
        ("fast prefill of shared caches", getattr(cache, "kv_sharing_fast_prefill", False), foreign),
        ("pooling", model.runner_type != "generate", "gates act on generated tokens"),
        ("prompts as embeddings", getattr(model, "enable_prompt_embeds", False), "no test covers them"),
        (
            "asynchronous scheduling", scheduler.async_scheduling and not _in_kernels(vllm_config),
            "a step waits for the decisions of the one before it, but under decode_path=kernel"
        ),
        (f"{_SECOND_RUNNER}=1", envs.VLLM_USE_V2_MODEL_RUNNER, "it runs on vLLM's first model runner"),
    ]  # fmt: skip
    return ((name, reason) for name, given, reason in rules if given)


def _in_kernels(vllm_config: Any) -> bool:
    return ServingSettings.of(vllm_config).decode_path == "kernel"


def _refuse_graphs(settings: ServingSettings) -> None:
    """Raise ValueError, in one sentence, where the plugin's CUDA graphs or kernels cannot be."""
    for name in settings.of_cuda:
        if not current_platform.is_cuda():
            raise ValueError(
                f"fbs.{name} is {getattr(settings, name)!r}, but vLLM runs on {current_platform.device_type} here; "
                f"leave it out"
            )
    if settings.decode_path == "kernel":
        try:
            check_cuda()
        except ValueError as error:
            raise ValueError(f"fbs.decode_path is 'kernel': {error}") from None
    if settings.graphs == "branches":
        check_bindings()


def _refuse_foreign_classes(vllm_config: Any) -> None:
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.worker_cls not in ("auto", WORKER):
        raise ValueError(
            f"worker_cls is {parallel.worker_cls}, but an FBS model needs its own; put what yours adds into a "
            f"worker_extension_cls derived from {_CALLS}"
        )
    given = {
        "worker_extension_cls": (parallel.worker_extension_cls, _CALLS),
        "scheduler_cls": (scheduler.scheduler_cls, AHEAD if scheduler.async_scheduling else SCHEDULER),
    }  # fmt: skip
    for name, (value, needed) in given.items():
        if value and not _derives(value, needed):
            raise ValueError(
                f"{name} is {value}, but an FBS model needs its own; derive yours from {needed}"
            )


def _derives(given: Any, needed: str) -> bool:
    found = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    return issubclass(found, resolve_obj_by_qualname(needed))


@functools.cache  # once in a process
def check_prefix_caching() -> None:
    """Refuse a prefix cache that somebody asked for, where a Chunk-Head forbids it.

    Only EngineArgs tell a wish (True) from a default (None), and they fill in the default soon after they
    have made the model's configuration.
    """
    from vllm.engine.arg_utils import EngineArgs

    plain = EngineArgs.create_model_config

    @functools.wraps(plain)
    def create_model_config(self: EngineArgs) -> Any:
        model = plain(self)
        if isinstance(model.hf_config, FBSConfig) and model.hf_config.chunk:
            if self.enable_prefix_caching:
                raise ValueError(
                    "enable_prefix_caching cannot be used with a model that has a Chunk-Head: a cached prefix brings "
                    "keys and values, but not its chunks; leave it out"
                )
            self.enable_prefix_caching = False
        return model

    EngineArgs.create_model_config = create_model_config


# --- what must be so ----------------------------------------------------------------------------------


def adjust(vllm_config: Any) -> None:
    """Defaults without which skipping would be wrong or slow."""
    from vllm.config import CompilationMode, CUDAGraphMode

    config: FBSConfig = vllm_config.model_config.hf_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    _choose_runner(vllm_config)
    parallel.worker_cls = WORKER
    parallel.worker_extension_cls = parallel.worker_extension_cls or EXTENSION
    scheduler.async_scheduling = _may_be_ahead(vllm_config)
    scheduler.scheduler_cls = scheduler.scheduler_cls or (
        AHEAD if scheduler.async_scheduling else SCHEDULER
    )
    vllm_config.compilation_config.mode = CompilationMode.NONE
    # vLLM's graphs would hold the decisions of the step that they were captured in; decode_graphs has the plugin's own.
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    vllm_config.model_config.disable_cascade_attn = True
    if config.chunk:  # a configuration that no EngineArgs made comes with vLLM's default
        vllm_config.cache_config.enable_prefix_caching = False
    settings = _settle(vllm_config)
    _refuse_graphs(settings)
    _watch_requests(vllm_config, settings)
    several = parallel._api_process_count > 1 and parallel._api_process_rank >= 0
    if not several:  # what started them has said so
        logger.info(
            "FBS: %s decode path%s, %s gates; a request that says nothing gets gates=%s, tau=%g",
            settings.decode_path, "" if settings.graphs == "none" else f" in CUDA graphs ({settings.graphs})",
            settings.batch, config.gates, config.tau,
        )  # fmt: skip


def _may_be_ahead(vllm_config: Any) -> bool:
    """Whether a step may be prepared while the one in front runs, as vLLM does where nobody says otherwise. What the
    other ways of decoding may do in a step is planned on the host, from decisions that must be known there."""
    scheduler = vllm_config.scheduler_config
    own = scheduler.scheduler_cls
    return (
        _in_kernels(vllm_config)
        and scheduler.async_scheduling is not False
        and (not own or _derives(own, AHEAD))
    )


def _choose_runner(vllm_config: Any) -> None:
    """vLLM's first model runner, in this process and in those that it starts.

    The environment is the only switch. Limit: engines of other models that this process makes later get the
    same runner.
    """
    os.environ[_SECOND_RUNNER] = "0"
    envs.disable_envs_cache()  # kept since another engine in this process has started
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "an engine option (watermarking or HiSparse) asks for vLLM's second model runner, but an FBS model "
            "runs on the first; leave that option out"
        )


def _settle(vllm_config: Any) -> ServingSettings:
    """Check additional_config['fbs'] and give the counters of this engine a file."""
    extra = dict(vllm_config.additional_config or {})
    settings = ServingSettings.parse(extra.get("fbs", {}))
    if not settings.stats_file:
        settings = dataclasses.replace(settings, stats_file=str(engine_file(vllm_config)))
    extra["fbs"] = dataclasses.asdict(settings)
    vllm_config.additional_config = extra
    return settings


def _watch_requests(vllm_config: Any, settings: ServingSettings) -> None:
    """Have requests checked where they enter, failed texts made again, and both shown at /metrics."""
    from fbs_rl.serving.fallback import watch_texts

    model = vllm_config.model_config
    admission = Admission(model.hf_config, settings, not model.skip_tokenizer_init)
    check = admission_check(vllm_config.instance_id, admission)
    model.logits_processors = [*(model.logits_processors or []), check]
    check_prompts()
    watch_texts()
    register_collector(settings.stats_file)
    fallback_counters()
