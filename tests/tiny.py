"""Tiny real models for the tests: random Llama and Qwen3 backbones with FBS modules that do something."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from fbs_rl.model import FBSCache, FBSConfig, FBSForCausalLM
from fbs_rl.types import FBSOutput

LAYERS, HIDDEN, VOCAB, CONTEXT = 8, 48, 97, 128
SMALL: dict[str, Any] = {
    "paw_layers": "every:4",  # two of eight layers: the second uses the shortlist of the first
    "paw_rank": 32,
    "paw_vocab_size": 50,
    "paw_shortlist": 8,
    "paw_horizon": 5,
    "paw_fixed_window": 3,
    "paw_window_hidden": 16,
    "chunk_width": 32,
    "chunk_cache": 6,
    "chunk_distance_buckets": 4,
    "gate_residual_width": 16,
    "gate_preview_width": 8,
    "gate_hidden": 32,
    "adapter_rank": 8,
    "loss_preview_every": 1,
}
NOOP = {"kv_on_skip": "noop", "skip_path": "identity"}


@lru_cache
def backbone(
    family: str = "llama", tied: bool = False, attention: str = "sdpa", bias: bool = False
) -> PreTrainedModel:
    """A random backbone whose layers matter: weights large enough, norms uneven."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "attn_implementation": attention,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(11)
    if family == "llama":
        made: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**fields))
    else:
        made = Qwen3(Qwen3Config(head_dim=16, **fields))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.6, 1.4)
            elif "embed_tokens" in name:
                weight.normal_(std=0.4)
            elif name.endswith("bias"):
                weight.normal_(std=0.3)
            else:
                weight.normal_(std=0.8 * weight.shape[-1] ** -0.5)
    return made.eval()


def fresh(family: str = "llama", tied: bool = False, bias: bool = False, **options: Any) -> Any:
    """A new model of its own, at its initial values (equal to its backbone)."""
    attention = options.pop("attention", "sdpa")
    base = copy.deepcopy(backbone(family, tied, attention, bias))
    return FBSForCausalLM.from_backbone(base, FBSConfig(**{**SMALL, **options}))


@lru_cache
def lively(family: str = "llama", tied: bool = False, bias: bool = False, **options: Any) -> Any:
    """A shared model, not to be changed, whose modules all act and whose gates skip 20 to 60 %."""
    return enliven(fresh(family, tied, bias, **options))


@torch.no_grad()
def enliven(model: Any, seed: int = 5) -> Any:
    """Give every new parameter a value that a wrong use of it would show."""
    draw = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=draw))

    for name, parameter in model.model.new_parameters():
        if name.endswith("strength"):
            parameter.fill_(0.7)
        elif name.endswith(("norm.weight", "query_scale_R")):
            noise(parameter, 0.2, mean=1.0)
        elif name.endswith(("query_bias_R", "null_value", "unk_R", "hidden.bias", "mix.bias")):
            noise(parameter, 0.3)
        elif name.endswith("distance_bias"):
            noise(parameter, 1.0)
        elif name.endswith("skip_path.up.weight"):
            noise(parameter, 0.2)
        elif name.endswith(("window_out.weight", "skip_gate.out.weight")):
            noise(parameter, 4.0 * parameter.shape[-1] ** -0.5)
        elif name.startswith("segment_position"):
            noise(parameter, 0.3)
    if model.model.boundary is not None:
        model.model.boundary.classify.weight.mul_(1.5)
    if model.model.preview is not None:
        counts = torch.randint(0, 50, (VOCAB,), generator=draw)
        model.model.preview.set_vocabulary(counts)
    if model.model.segment_position is not None:
        kinds = torch.zeros(VOCAB, dtype=torch.uint8)
        kinds[torch.randperm(VOCAB, generator=draw)[:30]] = 1
        kinds[torch.randperm(VOCAB, generator=draw)[:12]] = 2
        model.model.segment_position.kind_V.copy_(kinds)
    _centre(model)
    return model


def _centre(model: Any) -> None:
    """Shift biases until each layer skips about 45 % of random tokens and B, I, O, S all occur."""
    ids = torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(6))
    if model.model.boundary is not None:
        mean = model(ids).boundary_logits.mean((0, 1))
        model.model.boundary.classify.bias[:4] += torch.tensor([0.8, 1.2, 0.1, 0.1]) - mean
    for layer in model.model.layers:
        if layer.skip_gate is None:
            continue
        decided = model.config.block_asked_at(layer.index)
        free = [i for i in decided if i not in model.config.protected_layers]
        prob = model(ids, gates="threshold", tau=0.5).gate_prob[free[0]]
        layer.skip_gate.out.bias -= torch.logit(prob).quantile(0.55) + 0.02


def left_padded(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(ids [B, T], attention mask [B, T]); the padding holds random tokens, so reading it shows."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(0, VOCAB, (len(lengths), width), generator=draw)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return ids, mask


@torch.no_grad()
def stepwise(
    model: Any, ids: Tensor, mask: Tensor, prompt: int = 0, poison: bool = True, **gates: Any
) -> FBSOutput:
    """The pass with a cache: `prompt` columns in one call, then one column a call."""
    cache = FBSCache(model.config.layer_count, poison=poison)
    edges = [0, *range(max(prompt, 1), ids.shape[1] + 1)]
    skip = gates.pop("skip", None)
    outputs = []
    for start, stop in itertools.pairwise(edges):
        part = {} if skip is None else {"skip": skip[:, :, start:stop]}
        outputs.append(
            model(ids[:, start:stop], mask[:, :stop], past_key_values=cache, **gates, **part)
        )
    return FBSOutput(
        logits=torch.cat([o.logits for o in outputs], 1),
        gate_prob=torch.cat([o.gate_prob for o in outputs], 2),
        skip=torch.cat([o.skip for o in outputs], 2),
        lookahead=_joined([o.lookahead for o in outputs], 2),
        boundary_logits=_joined([o.boundary_logits for o in outputs], 1),
        past_key_values=cache,
    )


def _joined(parts: list[Tensor | None], dim: int) -> Tensor | None:
    return None if parts[0] is None else torch.cat([p for p in parts if p is not None], dim)


def assert_same(
    found: FBSOutput, wanted: FBSOutput, mask: Tensor | None = None, tolerance: float = 1e-5
) -> None:
    """Equal decisions, and every other quantity within `tolerance` (relative above 1), on valid tokens."""
    assert wanted.logits is not None and wanted.skip is not None
    valid = torch.ones(wanted.logits.shape[:2]) if mask is None else mask
    valid_BT = valid.bool()
    assert torch.equal(found.skip[:, valid_BT], wanted.skip[:, valid_BT])
    for name in ("logits", "gate_prob", "lookahead", "boundary_logits"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        if one is None:
            continue
        if name in ("gate_prob", "lookahead"):
            one, other = one[:, valid_BT], other[:, valid_BT]
        else:
            one, other = one[valid_BT], other[valid_BT]
        torch.testing.assert_close(
            one,
            other,
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
