"""Backbones of a known shape with random weights: what latency depends on, and nothing that quality depends on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-1.7b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
"""Qwen3 shapes by name; "tiny" is for trying out commands (vLLM's attention on a CPU wants heads of 32 or more)."""


def check_geometry(name: str) -> None:
    """Raise ValueError for an unknown name."""
    if name not in GEOMETRIES:
        raise ValueError(f"no geometry {name!r}; there are {', '.join(GEOMETRIES)}")


def random_backbone(name: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """A Qwen3 of this shape with tied embeddings, seeded, in evaluation mode. Raises ValueError for an unknown name."""
    check_geometry(name)
    config = Qwen3Config(
        **GEOMETRIES[name],
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()
