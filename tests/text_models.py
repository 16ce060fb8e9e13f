"""Tiny models with a tokenizer that read and write text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import save_gates
from fbs_rl.model import FBSConfig, FBSForCausalLM
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import SMALL

LAYERS, CONTEXT, NEW = 8, 96, 16
PROMPT = "读书 and skip"


def tiny_backbone(vocab_size: int, hidden: int = 32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.7, 1.3)
    return model.eval()


def tiny_fbs(vocab_size: int, hidden: int = 32, seed: int = 0, **options: Any) -> FBSForCausalLM:
    """Its gates differ between tokens and layers, around a probability of 0.5."""
    options = {**SMALL, "tau": 0.5, "gates_origin": "trained", **options}
    model = FBSForCausalLM.from_backbone(
        tiny_backbone(vocab_size, hidden, seed), FBSConfig(**options)
    )
    made: Any = model
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in made.model.layers:
            if layer.skip_gate is not None:
                weight = layer.skip_gate.out.weight
                weight.copy_(torch.randn(weight.shape, generator=draw))
                layer.skip_gate.out.bias.zero_()
    return model


def make_places(root: Path, large: Path) -> dict[str, str]:
    """Folders with models and gates, by what is special about them."""
    tokenizer, vocab = saveable_tokenizer(), len(saveable_tokenizer())
    made = tiny_fbs(vocab)
    models: dict[str, Any] = {
        "fbs": made,
        "backbone": tiny_backbone(vocab),
        "other": tiny_fbs(vocab, hidden=48),
        "gateless": tiny_fbs(vocab, gate=False),
        "chat": made,
        "gpt2": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=vocab)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        (saveable_tokenizer(chat=True) if name == "chat" else tokenizer).save_pretrained(
            root / name
        )
    saveable_tokenizer(size=290).save_pretrained(root / "fits")
    tiny_backbone(600).save_pretrained(large)
    saveable_tokenizer(size=330).save_pretrained(large)
    save_gates(made, root / "gates")
    save_gates(models["other"], root / "other_gates")
    save_gates(tiny_fbs(vocab, seed=1), root / "retrained_gates")
    (root / "empty").mkdir()
    (root / "empty.txt").write_text("\n")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    (root / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
    names = {path.name: str(path) for path in root.iterdir()}
    return names | {"large": str(large), "nowhere": str(root / "nowhere")}


def base(places: dict[str, str]) -> list[str]:
    """Arguments that continue PROMPT with the FBS model."""
    return [places["fbs"], "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
