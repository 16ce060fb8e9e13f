"""What vLLM calls in each of its processes before it reads a model (entry point vllm.general_plugins)."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know FBSForCausalLM: its configuration, its model, its defaults. May be called again.

    Changes nothing for other models: what FBS engines need is set when the configuration of one is made.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import fbs_rl.model  # noqa: F401  (registers the configuration with transformers)
    from fbs_rl.serving.engine_checks import FBSEngineConfig, check_prefix_caching

    if "FBSForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("FBSForCausalLM", "fbs_rl.serving.served_model:FBSForCausalLM")
    MODELS_CONFIG_MAP["FBSForCausalLM"] = FBSEngineConfig
    check_prefix_caching()
