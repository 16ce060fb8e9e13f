"""What vLLM calls in each of its processes before it reads a model (entry point vllm.general_plugins)."""

from __future__ import annotations

import os


def register() -> None:
    """Make vLLM know FBSForCausalLM: its configuration, its model, its defaults. May be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import fbs_rl.model  # noqa: F401  (registers the configuration with transformers)
    from fbs_rl.serving.engine_checks import FBSEngineConfig

    # The plugin stands on the first-generation runner, which the second replaces on CUDA by default.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if "FBSForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("FBSForCausalLM", "fbs_rl.serving.served_model:FBSForCausalLM")
    MODELS_CONFIG_MAP["FBSForCausalLM"] = FBSEngineConfig
