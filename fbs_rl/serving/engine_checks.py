"""Engine options for an FBS model: defaults that are right for it, and one sentence for what cannot work."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.serving.admission import admission_check
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.serving.step_stats import register_collector

logger = init_logger(f"vllm.{__name__}")

WORKER = "fbs_rl.serving.worker.FBSWorker"
EXTENSION = "fbs_rl.serving.runner.FBSWorkerExtension"
SCHEDULER = "fbs_rl.serving.scheduler.FBSScheduler"


class FBSEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls this with the configuration of an engine for an FBS model, once, before it starts anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        refuse(vllm_config)
        adjust(vllm_config)


def refuse(vllm_config: Any) -> None:
    """Raise ValueError, in one sentence, for the first option that an FBS model cannot be served with."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    config: FBSConfig = vllm_config.model_config.hf_config
    wanted = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1),
    }
    for name, value in wanted.items():
        if value != 1:
            raise ValueError(
                f"{name} is {value}; an FBS model is served by one device an engine (use "
                f"data_parallel_size for more)"
            )
    unsupported = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "a KV connector (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "dual-batch overlap (enable_dbo)": getattr(parallel, "enable_dbo", False),
        "a quantised KV cache": cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
    }
    for name, asked in unsupported.items():
        if asked:
            raise ValueError(f"{name} does not work with layers that tokens skip; leave it out")
    if config.segment_position:
        raise ValueError(
            "this model adds segment positions (segment_position), which serving does not know; decode it "
            "with transformers"
        )


def adjust(vllm_config: Any) -> None:
    """Defaults without which skipping would be wrong or slow."""
    from vllm.config import CompilationMode

    config: FBSConfig = vllm_config.model_config.hf_config
    parallel = vllm_config.parallel_config
    parallel.worker_cls = WORKER
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = EXTENSION
    elif parallel.worker_extension_cls != EXTENSION:
        raise ValueError(
            f"worker_extension_cls is {parallel.worker_extension_cls}; an FBS engine needs its own "
            f"({EXTENSION}): derive yours from it"
        )
    # What the model may do in a step is planned on the host, from tokens that are known there.
    vllm_config.scheduler_config.async_scheduling = False
    vllm_config.compilation_config.mode = CompilationMode.NONE
    vllm_config.model_config.disable_cascade_attn = True
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    if config.chunk and vllm_config.cache_config.enable_prefix_caching:
        # vLLM's default, and it does not tell whether anybody asked for it.
        logger.info(
            "prefix caching is off: a cached prefix would bring keys and values but not its chunks"
        )
        vllm_config.cache_config.enable_prefix_caching = False
    settings = _settle(vllm_config)
    check = admission_check(vllm_config.instance_id, config, settings)
    vllm_config.model_config.logits_processors = [
        *(vllm_config.model_config.logits_processors or []), check,
    ]  # fmt: skip
    register_collector(settings.stats_file)
    logger.info(
        "FBS: %s decode path, %s gates, requests are %s unless they say otherwise",
        settings.decode_path, settings.batch, config.gates,
    )  # fmt: skip


def _settle(vllm_config: Any) -> ServingSettings:
    """Check additional_config['fbs'] and give the counters of this engine a file."""
    extra = dict(vllm_config.additional_config or {})
    settings = ServingSettings.parse(extra.get("fbs", {}))
    if not settings.stats_file:
        handle, path = tempfile.mkstemp(prefix="fbs_stats_")
        os.close(handle)
        settings = dataclasses.replace(settings, stats_file=path)
    extra["fbs"] = dataclasses.asdict(settings)
    vllm_config.additional_config = extra
    return settings
