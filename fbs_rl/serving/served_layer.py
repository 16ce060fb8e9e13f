"""One layer as vLLM runs it: vLLM's products and paged attention, the FBS modules of the model itself.

The pieces are those of fbs_rl.model.layer, on tokens without a batch axis (N tokens of any requests). Queries
and keys/values are separate products: a token that skips under `project` needs the second without the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP

from fbs_rl.model.chunk_head import ChunkReader
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.preview import Paw
from fbs_rl.model.skip_gate import SkipGate
from fbs_rl.model.skip_path import SkipAdapter, SkipIdentity
from fbs_rl.types import SkipPathKind


class Norm(nn.Module):
    """RMSNorm through vLLM's kernel, which is one operation."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps

    def forward(self, state: Tensor) -> Tensor:
        return rms_norm(state, self.weight, self.eps)


def rms_norm(state: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · state / RMS(state) over the last axis."""
    out = torch.empty_like(state)
    torch.ops._C.rms_norm(out, state, weight, eps)
    return out


class ServedAttention(nn.Module):
    """Projections, rotary positions and the paged cache of one layer."""

    def __init__(self, config: FBSConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.groups = config.num_key_value_heads or self.heads
        self.head_dim = config.head_dim or config.hidden_size // self.heads
        bias, quant = config.attention_bias, vllm_config.quant_config
        width = self.groups * self.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, self.heads * self.head_dim, bias=bias, quant_config=quant, prefix=f"{prefix}.q_proj"
        )  # fmt: skip
        self.kv_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], bias=bias, quant_config=quant, prefix=f"{prefix}.kv_proj"
        )  # fmt: skip
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
        if config.backbone_type == "qwen3":  # norms queries and keys per head
            self.q_norm = Norm(self.head_dim, config.rms_norm_eps)
            self.k_norm = Norm(self.head_dim, config.rms_norm_eps)

    def queries_keys_values(
        self, input_Nd: Tensor, position_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, H·D] and keys, values [N, G·D] of the same tokens."""
        query, (key, value) = self._queries(input_Nd), self._keys_values(input_Nd)
        query, rotated = self.rotary_emb(position_N, query, key)
        assert rotated is not None
        return query, rotated, value

    def keys_values(self, input_Nd: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values alone."""
        key, value = self._keys_values(input_Nd)
        key, _ = self.rotary_emb(position_N, key, None)
        return key, value

    def _queries(self, input_Nd: Tensor) -> Tensor:
        query = self.q_proj(input_Nd)[0]
        return self._per_head(query, self.q_norm) if hasattr(self, "q_norm") else query

    def _keys_values(self, input_Nd: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.kv_proj(input_Nd)[0].chunk(2, dim=-1)
        key = key.contiguous()
        return (self._per_head(key, self.k_norm) if hasattr(self, "k_norm") else key), value

    def _per_head(self, flat: Tensor, norm: Norm) -> Tensor:
        return norm(flat.view(-1, self.head_dim)).view_as(flat)


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

    def input_norm(self, injected_Nd: Tensor, state_Nd: Tensor, normed_Nd: Tensor) -> Tensor:
        """The backbone's input norm of h̃; where nothing was injected, x̂ = normed_Nd is half of it already."""
        if injected_Nd is state_Nd:
            return self.input_layernorm.weight * normed_Nd
        return self.input_layernorm(injected_Nd)

    def finish(self, state_Nd: Tensor, attended_NX: Tensor) -> Tensor:
        """The layer's output from its (injected) input and what attention read."""
        state_Nd = state_Nd + self.self_attn.o_proj(attended_NX)[0]
        return state_Nd + self.mlp(self.post_attention_layernorm(state_Nd))
