"""One layer as vLLM runs it: vLLM's products and paged attention, the FBS modules of the model itself.

The pieces are those of fbs_rl.model.layer, on tokens without a batch axis (N tokens of any requests). Queries,
keys and values are one product; a token that skips under `project` needs keys and values alone, which is
another, with the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP

from fbs_rl.model.chunk_head import ChunkReader
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.preview import Paw
from fbs_rl.model.skip_gate import SkipGate
from fbs_rl.model.skip_path import SkipAdapter, SkipIdentity
from fbs_rl.types import KVPolicy, SkipPathKind


class Norm(nn.Module):
    """RMSNorm through vLLM's kernel, which is one operation."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    @classmethod
    def like(cls, norm: nn.RMSNorm) -> Any:
        """In the place of a norm of the FBS modules: on a CPU torch's own is ten operations."""
        assert norm.eps is not None
        return cls(norm.normalized_shape[0], norm.eps)

    def forward(self, state: Tensor) -> Tensor:
        return rms_norm(state, self.weight, self.eps)


def rms_norm(state: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · state / RMS(state) over the last axis."""
    out = torch.empty_like(state)
    torch.ops._C.rms_norm(out, state, weight, eps)
    return out


def silu_and_multiply(gate_up_NX: Tensor) -> Tensor:
    """SiLU of the first half of the columns, times the second half; one operation too."""
    width = gate_up_NX.shape[-1] // 2
    out = gate_up_NX.new_empty(*gate_up_NX.shape[:-1], width)
    torch.ops._C.silu_and_mul(out, gate_up_NX)
    return out


def product(linear: Any, input_NX: Tensor) -> Tensor:
    """What one of vLLM's linear modules makes. On a GPU, where launching takes longer than most products, without its
    detours: weights are neither packed nor quantised nor cut over devices there."""
    if input_NX.is_cuda:
        return F.linear(input_NX, linear.weight.data, linear.bias)
    return linear(input_NX)[0]


class ServedAttention(nn.Module):
    """Projections, rotary positions and the paged cache of one layer."""

    def __init__(self, config: FBSConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads or self.heads
        self.head_dim = config.head_dim or config.hidden_size // self.heads
        bias, quant = config.attention_bias, vllm_config.quant_config
        self.widths = (self.heads * self.head_dim, *[self.groups * self.head_dim] * 2)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, self.heads, self.groups, bias=bias, quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        if config.kv_on_skip == KVPolicy.PROJECT:
            self.kv_proj = MergedColumnParallelLinear(
                config.hidden_size, list(self.widths[1:]), bias=bias, quant_config=quant,
                prefix=f"{prefix}.kv_proj",
            )  # fmt: skip
            # One memory, filled by loading qkv_proj; vLLM packs either for its own use on a CPU.
            for name, whole in self.qkv_proj.named_parameters():
                self.kv_proj.get_parameter(name).data = whole.data[self.widths[0] :]
        self.o_proj = RowParallelLinear(
            self.heads * self.head_dim, config.hidden_size, bias=bias, quant_config=quant, prefix=f"{prefix}.o_proj"
        )  # fmt: skip
        self.rotary_emb = get_rope(
            self.head_dim, config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            self.heads, self.head_dim, self.head_dim**-0.5, num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config, quant_config=quant, prefix=f"{prefix}.attn",
        )  # fmt: skip
        self.norms_heads = config.backbone_type == "qwen3"
        if self.norms_heads:
            self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
            self.k_norm = Norm(self.head_dim, config.rms_norm_eps)

    def queries_keys_values(
        self, input_Nd: Tensor, position_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, H·D] and keys, values [N, G·D] of the same tokens."""
        query, key, value = product(self.qkv_proj, input_Nd).split(self.widths, dim=-1)
        if self.norms_heads:
            query, key = self._per_head(query, self.q_norm), self._per_head(key, self.k_norm)
        query, rotated = self.rotary_emb(position_N, query, key)
        assert rotated is not None
        return query, rotated, value

    def keys_values(self, input_Nd: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values alone."""
        key, value = product(self.kv_proj, input_Nd).chunk(2, dim=-1)
        # As a query: not every kernel takes keys without, or queries that lie between other numbers.
        key = self._per_head(key, self.k_norm) if self.norms_heads else key.contiguous()
        key, _ = self.rotary_emb(position_N, key, None)
        return key, value

    def _per_head(self, flat: Tensor, norm: Norm) -> Tensor:
        return norm(flat.reshape(-1, self.head_dim)).view(flat.shape)


class ServedLayer(nn.Module):
    """Layer `index`, with the sub-module names of a checkpoint."""

    def __init__(self, config: FBSConfig, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        self.index = index
        self.self_attn = ServedAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act,
            quant_config=vllm_config.quant_config, bias=config.mlp_bias, prefix=f"{prefix}.mlp",
        )  # fmt: skip
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.paw = Paw(config) if index in config.preview_layers else None
        self.chunk_reader = ChunkReader(config) if index in config.reader_layers else None
        self.skip_gate = SkipGate(config) if index in config.gate_leaders else None
        adapts = index not in config.protected_layers and config.skip_path == SkipPathKind.ADAPTER
        self.skip_path: Any = SkipAdapter(config) if adapts else SkipIdentity()
        # What a step asks of every layer; a configuration's attributes are slow to read.
        self.never_skips = index in config.protected_layers
        self.asks = len(config.block_asked_at(index)) > 0
        self.decided_before = config.gate_ahead > 0
        self.finds_chunks = index == config.boundary_layer
        self.projects = config.kv_on_skip == KVPolicy.PROJECT
        if self.paw is not None:
            self.paw.up_norm = Norm.like(self.paw.up_norm)
        if self.skip_gate is not None and self.skip_gate.reads_residual:
            self.skip_gate.reduce_norm = Norm.like(self.skip_gate.reduce_norm)

    def input_norm(self, injected_Nd: Tensor, state_Nd: Tensor, normed_Nd: Tensor) -> Tensor:
        """The backbone's input norm of h̃; where nothing was injected, x̂ = normed_Nd is half of it already."""
        if injected_Nd is state_Nd:
            return self.input_layernorm.weight * normed_Nd
        return self.input_layernorm(injected_Nd)

    def finish(self, state_Nd: Tensor, attended_NX: Tensor) -> Tensor:
        """The layer's output from its (injected) input and what attention read."""
        state_Nd = state_Nd + product(self.self_attn.o_proj, attended_NX)
        gate_up_NX = product(self.mlp.gate_up_proj, self.post_attention_layernorm(state_Nd))
        return state_Nd + product(self.mlp.down_proj, silu_and_multiply(gate_up_NX))


def raw_weights(layer: ServedLayer) -> dict[str, Tensor]:
    """The layer's matrices as they were loaded, by their names in the layer."""
    attention, mlp = layer.self_attn, layer.mlp
    modules: dict[str, Any] = {
        "qkv": attention.qkv_proj, "out": attention.o_proj, "gate_up": mlp.gate_up_proj, "down": mlp.down_proj,
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        found[name] = module.weight.data
        if getattr(module, "bias", None) is not None:
            found[f"{name}_bias"] = module.bias.data
    return found
