"""FBSLayer: one layer of the backbone with what FBS adds to it.

The backbone's sub-modules keep their names, so its keys in a checkpoint do not change. The methods are
the pieces that both passes (a whole sequence, one decoding step) are put together from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbs_rl.model.attention import attend_sequence, rotate
from fbs_rl.model.chunk_head import ChunkReader
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.preview import Paw
from fbs_rl.model.skip_gate import SkipGate
from fbs_rl.model.skip_path import SkipAdapter, SkipIdentity
from fbs_rl.types import SkipPathKind

Rope = tuple[Tensor, Tensor]


class FBSLayer(nn.Module):
    """Layer `index`. paw, chunk_reader and skip_gate are None where the configuration puts none."""

    def __init__(self, config: FBSConfig, block: Any, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.self_attn: Any = block.self_attn
        self.mlp: nn.Module = block.mlp
        self.input_layernorm: nn.Module = block.input_layernorm
        self.post_attention_layernorm: nn.Module = block.post_attention_layernorm
        self.head_dim: int = block.self_attn.head_dim
        self.paw = Paw(config) if index in config.preview_layers else None
        self.chunk_reader = ChunkReader(config) if index in config.reader_layers else None
        self.skip_gate = SkipGate(config) if index in config.gate_leaders else None
        may_skip = index not in config.protected_layers
        adapts = may_skip and config.skip_path == SkipPathKind.ADAPTER
        self.skip_path = SkipAdapter(config) if adapts else SkipIdentity()

    def queries(self, input_BTd: Tensor, rope: Rope) -> Tensor:
        """Rotated queries [B, H, T, D] of a normed input."""
        return rotate(self._heads(self.self_attn.q_proj(input_BTd), "q_norm"), rope)

    def keys_values(self, input_BTd: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, G, T, D] of a normed input."""
        key = rotate(self._heads(self.self_attn.k_proj(input_BTd), "k_norm"), rope)
        return key, self._heads(self.self_attn.v_proj(input_BTd), None)

    def _heads(self, flat_BTX: Tensor, norm: str | None) -> Tensor:
        heads = flat_BTX.unflatten(-1, (-1, self.head_dim))
        if norm is not None and hasattr(
            self.self_attn, norm
        ):  # Qwen3 norms queries and keys per head
            heads = getattr(self.self_attn, norm)(heads)
        return heads.transpose(1, 2)

    def finish(self, state_BTd: Tensor, attended_BTX: Tensor) -> Tensor:
        """The layer's output from its (injected) input and what attention read."""
        state_BTd = state_BTd + self.self_attn.o_proj(attended_BTX)
        return state_BTd + self.mlp(self.post_attention_layernorm(state_BTd))

    def run_sequence(
        self, injected_BTd: Tensor, key_source_BTd: Tensor, rope: Rope, mask_B1TT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output, keys, values) for every token of a sequence.

        injected_BTd: h̃. key_source_BTd: what keys and values are computed from: h̃ where the token
        runs the layer, h where it skips it; the same tensor object as h̃ where they do not differ.
        """
        normed_BTd = self.input_layernorm(injected_BTd)
        key_input_BTd = (
            normed_BTd if key_source_BTd is injected_BTd else self.input_layernorm(key_source_BTd)
        )
        key, value = self.keys_values(key_input_BTd, rope)
        attended = attend_sequence(
            self.self_attn, self.config, self.queries(normed_BTd, rope), key, value, mask_B1TT
        )
        return self.finish(injected_BTd, attended), key, value


def unit_norm(state: Tensor, eps: float) -> Tensor:
    """x̂ = RMSNorm(h) without a weight: what every FBS module reads."""
    return F.rms_norm(state, state.shape[-1:], eps=eps)


def straight_through(
    prob: Tensor, skipped_BTd: Tensor, executed_BTd: Tensor, skip_BT: Tensor
) -> Tensor:
    """z̃·skipped + (1 − z̃)·executed with z̃ = z + p − sg(p) (SPEC 4.2).

    Written so that the value is one branch or the other to the last bit: the gradient to p is carried
    by a term whose value is zero.
    """
    chosen = torch.where(skip_BT.unsqueeze(-1), skipped_BTd, executed_BTd)
    if not prob.requires_grad:
        return chosen
    carrier = (prob - prob.detach()).unsqueeze(-1).to(chosen.dtype)
    return chosen + carrier * (skipped_BTd - executed_BTd).detach()
