"""Tiny real FBS folders that vLLM can serve, and what the parallel pass says of the same requests.

vLLM's attention on a CPU wants heads of 32 or more, so these are a little larger than tests.tiny.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fbs_rl.model import FBSConfig, FBSForCausalLM
from tests.tiny import LAYERS, SMALL, VOCAB, enliven


def make_folder(
    folder: Path, family: str = "llama", vocab: int = VOCAB, **options: Any
) -> FBSForCausalLM:
    """A saved model whose modules all act and whose gates skip about half; the model itself comes back."""
    fields = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,  # a tied one would repeat a token for ever
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(11)
    backbone: Any = (
        LlamaForCausalLM(LlamaConfig(**fields))
        if family == "llama"
        else Qwen3ForCausalLM(Qwen3Config(**fields))
    )
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.6, 1.4)
            elif "embed_tokens" in name:
                weight.normal_(std=0.4)
            else:
                weight.normal_(std=0.8 * weight.shape[-1] ** -0.5)
    options = {**SMALL, "gates": "threshold", "tau": 0.5, **options}
    model = enliven(FBSForCausalLM.from_backbone(backbone.eval(), FBSConfig(**options)))
    model.save_pretrained(folder)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Referee:
    """What the parallel pass found on a request's own tokens: its choices, decisions and probabilities."""

    chosen: list[int]
    skip_TL: Tensor
    prob_TL: Tensor
    nll_N: Tensor


@torch.no_grad()
def referee(
    model: FBSForCausalLM, prompt: Sequence[int], output: Sequence[int], **gates: Any
) -> Referee:
    """One pass over prompt and output together, gates acting behind the prompt (or decode_start).

    chosen: the likeliest token behind the prompt and behind each of the output's. Columns: of all tokens from
    decode_start on but the last, which is not fed. nll_N: of the output's tokens.
    """
    ids = torch.tensor([[*prompt, *output]])
    start = gates.pop("decode_start", len(prompt))
    out = model(ids, decode_start=start, **gates)
    logp_TV = out.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    nll_N = -logp_TV.gather(1, torch.tensor(list(output)).unsqueeze(1))[:, 0]
    columns = slice(start, ids.shape[1] - 1)
    return Referee(
        logp_TV.argmax(-1).tolist(),
        out.skip[:, 0, columns].T,
        out.gate_prob[:, 0, columns].T,
        nll_N,
    )
