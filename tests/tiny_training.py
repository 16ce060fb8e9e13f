"""A tiny Stage-1 world for the tests: a random Qwen3 folder and shards of the shipped text, both real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fbs_rl.config import from_tree
from fbs_rl.data.samples import load_sample
from fbs_rl.data.shards import write_shards
from fbs_rl.training.settings import PretrainSettings
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import SMALL

TOKENS = 48
VOCAB = 300


def make_backbone(folder: Path) -> Path:
    """A Qwen3 of four layers with the small tokenizer, saved."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    saveable_tokenizer(size=VOCAB).save_pretrained(folder)
    return folder


def make_shards(folder: Path, rows: int = 40) -> Path:
    """About `rows` training sequences of English and Chinese, in short documents so that rows hold several."""
    pieces = {}
    for split, wanted in (("train", rows), ("heldout", 10)):
        texts = [d.text for lang in ("en", "zh") for d in load_sample(lang, split)]
        lengths = (25, 90, 40, 12)
        parts = [t[200 * i : 200 * i + n] for t in texts[::3] for i, n in enumerate(lengths)]
        pieces[split] = _interleaved(parts)[: wanted * TOKENS // 40]
    write_shards(folder, pieces, saveable_tokenizer(size=VOCAB), TOKENS)
    return folder


def _interleaved(parts: list[str]) -> list[str]:
    """First halves and second halves in turn, so that languages alternate."""
    middle = len(parts) // 2
    return [part for pair in zip(parts[:middle], parts[middle:], strict=False) for part in pair]


def settings_tree(root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that takes a second; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "data": str(root / "shards"),
        "model": {"backbone": str(root / "backbone"), "options": {**SMALL, "loss_gate": 1.0}},
        "batch": {"step_sequences": 4, "micro_sequences": 1},
        "optimizer": {"lr_backbone": 1e-3, "lr_new": 1e-3, "lr_gate": 1e-2, "warmup_frac": 0.2},
        "phases": {"steps": 12, "observe_frac": 0.5, "cross_entropy_steps": 2},
        "cluster": {
            "ranks": 1,
            "device": "cpu",
            "precision": "fp32",
            "start_deadline_s": 600,
            "step_deadline_s": 300,
            "save_deadline_s": 300,
        },
        "checkpoint": {"every_steps": 4},
        "evaluation": {
            "every_steps": 6,
            "sequences": 3,
            "calibration_sequences": 2,
            "skip_ratios": [0.3],
            "sample_prompts": 1,
            "sample_tokens": 4,
        },
        "tracking": {"wandb": "off"},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (tree[section] if section else tree)[name] = value
    return tree


def settings(root: Path, **changes: Any) -> PretrainSettings:
    return from_tree(PretrainSettings, settings_tree(root, **changes))
