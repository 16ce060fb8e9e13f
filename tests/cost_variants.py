"""Tiny models of every kind whose cost is counted."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.model import FBSConfig, FBSForCausalLM
from tests.tiny import NOOP, SMALL, backbone, fresh, lively

CAP = 2  # closed chunks in sight, few enough that short runs meet the limit
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": NOOP,
    "noop, adapter": {"kv_on_skip": "noop"},
    "project, identity": {"skip_path": "identity"},
    "no paw": {"paw": False, "gate_inputs": "residual"},
    "no chunk": {"chunk": False},
    "no gate": {"gate": False},
    "backbone": {"paw": False, "chunk": False, "gate": False},
    "fixed window, mean": {"paw_window": "fixed", "paw_compression": "mean"},
    "linear, preview gate": {"paw_compression": "linear", "gate_inputs": "preview"},
    "none, every layer": {"paw_compression": "none", "paw_layers": "all", "gate_block": 2},
    "full space": {"paw_embed_space": "full", "gate_block": 3, "never_skip": (0, -1, -2)},
    "segments": {"segment_position": True},
}
FAMILIES = ("llama", "qwen3")


def build(variant: str = "default", family: str = "llama", **made_of: Any) -> FBSForCausalLM:
    return lively(family, **{"chunk_cache": CAP, **VARIANTS[variant], **made_of})


def of_every_shape(variant: str) -> list[FBSForCausalLM]:
    """Biases in attention, a tied table, biases in the MLP."""
    fields: dict[str, Any] = backbone().config.to_dict() | {"mlp_bias": True}
    biased = LlamaForCausalLM(LlamaConfig(**fields))
    made_of = {"chunk_cache": CAP, **VARIANTS[variant]}
    return [
        fresh("llama", bias=True, **made_of),
        fresh("qwen3", tied=True, **made_of),
        FBSForCausalLM.from_backbone(biased, FBSConfig(**{**SMALL, **made_of})),
    ]
