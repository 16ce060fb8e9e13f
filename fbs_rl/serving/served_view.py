"""A served model once more as fbs_rl.model has it, on the same memory: what the graph decoder's kernels are told of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fbs_rl.model.decoder import FAMILIES, backbone_config
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.serving.served_layer import ServedLayer, raw_weights

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


def view_of(
    served: ServedModel, head_Vd: Tensor, raw: Sequence[dict[str, Tensor]] | None = None
) -> FBSForCausalLM:
    """head_Vd: of the logits. raw: raw_weights of each layer, where its modules do not hold them as they were loaded.

    Its FBS modules are the served model's own; its matrices are parts of the served model's.
    """
    config = served.config
    with torch.device("meta"):
        view = FBSForCausalLM(config)
    inner, embedding = view.model, served.embed_tokens.weight
    assert isinstance(embedding, Tensor)
    _give(inner.embed_tokens, embedding[: config.vocab_size])
    _give(inner.norm, served.norm.weight)
    _give(view.lm_head, head_Vd[: config.vocab_size])
    rotary = FAMILIES[config.backbone_type].rotary(config=backbone_config(config))
    inner.rotary_emb = rotary.to(embedding.device)
    inner.preview, inner.boundary = served.preview, served.boundary
    for number, (layer, source) in enumerate(
        zip(inner.fbs_layers(), served.served_layers(), strict=True)
    ):
        _give_layer(layer, source, raw_weights(source) if raw is None else raw[number])
    return view.eval()


def _give_layer(layer: FBSLayer, source: ServedLayer, raw: dict[str, Tensor]) -> None:
    attention, mlp, theirs = layer.self_attn, layer.mlp, source.self_attn
    assert isinstance(mlp, nn.Module)
    bias = raw["qkv_bias"].split(theirs.widths) if "qkv_bias" in raw else (None, None, None)
    for name, weight, one in zip("qkv", raw["qkv"].split(theirs.widths), bias, strict=True):
        _give(getattr(attention, f"{name}_proj"), weight, one)
    _give(attention.o_proj, raw["out"], raw.get("out_bias"))
    if theirs.norms_heads:
        _give(attention.q_norm, theirs.q_norm.weight)
        _give(attention.k_norm, theirs.k_norm.weight)
    gate, up = raw["gate_up"].chunk(2)
    for name, weight in (("gate", gate), ("up", up), ("down", raw["down"])):
        _give(getattr(mlp, f"{name}_proj"), weight)
    _give(layer.input_layernorm, source.input_layernorm.weight)
    _give(layer.post_attention_layernorm, source.post_attention_layernorm.weight)
    layer.paw, layer.chunk_reader = source.paw, source.chunk_reader
    layer.skip_gate, layer.skip_path = source.skip_gate, source.skip_path


def _give(module: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """The module's weights are these from now on, where they lie."""
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
