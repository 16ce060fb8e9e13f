"""Sentence and paragraph ends come from the tokenizer when a backbone becomes an FBS model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import load_model
from fbs_rl.model import FBSConfig
from tests.small_tokenizer import saveable_tokenizer


def test_sentence_ends_are_found_in_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = saveable_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(
        str(tmp_path), fbs=FBSConfig(segment_position=True, paw_fixed_window=3)
    ).model
    assert model.model.segment_position is not None
    kinds = model.model.segment_position.kind_V
    stop, line, letter = (tokenizer(text).input_ids[0] for text in (".", "\n", "a"))
    assert [int(kinds[i]) for i in (stop, line, letter)] == [1, 2, 0]
