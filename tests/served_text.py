"""A tiny real FBS folder with a tokenizer and a chat template, which vLLM can serve as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import export_model
from fbs_rl.model import FBSConfig, FBSForCausalLM
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import LAYERS, SMALL, enliven


def make_text_folder(folder: Path) -> tuple[FBSForCausalLM, Any]:
    """A saved model with a real tokenizer and a chat template; model and tokenizer themselves come back."""
    tokenizer = saveable_tokenizer(chat=True)
    torch.manual_seed(12)
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
            tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.6, 1.4)
            elif "embed_tokens" in name:
                weight.normal_(std=0.4)
            else:  # large where layers write: a text then depends on which of them ran
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(std=(2.4 if writes else 0.8) * weight.shape[-1] ** -0.5)
    model = enliven(FBSForCausalLM.from_backbone(backbone.eval(), FBSConfig(**SMALL))).eval()
    export_model(model, tokenizer, folder, tau=0.5)
    return model, tokenizer
