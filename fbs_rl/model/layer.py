"""FBSLayer: one layer of the backbone with what FBS adds to it.

The backbone's sub-modules keep their names, so its keys in a checkpoint do not change. The methods are
the pieces that both passes (a whole sequence, one decoding step) are put together from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from fbs_rl.model.attention import attend_sequence, rotate
from fbs_rl.model.chunk_head import ChunkReader
from fbs_rl.model.compiled import compilable
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
        self.input_layernorm: Any = block.input_layernorm
        self.post_attention_layernorm: nn.Module = block.post_attention_layernorm
        self.head_dim: int = block.self_attn.head_dim
        self.paw = Paw(config) if index in config.preview_layers else None
        self.chunk_reader = ChunkReader(config) if index in config.reader_layers else None
        self.skip_gate = SkipGate(config) if index in config.gate_leaders else None
        may_skip = index not in config.protected_layers
        adapts = may_skip and config.skip_path == SkipPathKind.ADAPTER
        self.skip_path = SkipAdapter(config) if adapts else SkipIdentity()

    def input_norm(self, injected_BTd: Tensor, state_BTd: Tensor, normed_BTd: Tensor) -> Tensor:
        """The backbone's input norm of h̃; where nothing was injected, x̂ = normed_BTd is half of it already."""
        if injected_BTd is state_BTd:
            return self.input_layernorm.weight * normed_BTd
        return self.input_layernorm(injected_BTd)

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
        self,
        state_BTd: Tensor,
        normed_BTd: Tensor,
        injected_BTd: Tensor,
        skip_BT: Tensor | None,
        rope: Rope,
        mask_B1TT: Tensor | BlockMask | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output, keys, values) for every token of a sequence, as if it ran the layer.

        state_BTd: h. normed_BTd: x̂. injected_BTd: h̃, the same object as h where nothing was added.
        Keys and values of tokens that skip come from h, not from h̃ (SPEC 4.6).
        """
        input_BTd = self.input_norm(injected_BTd, state_BTd, normed_BTd)
        key_input_BTd = input_BTd
        if skip_BT is not None and injected_BTd is not state_BTd:
            plain_BTd = self.input_norm(state_BTd, state_BTd, normed_BTd)
            key_input_BTd = torch.where(skip_BT.unsqueeze(-1), plain_BTd, input_BTd)
        key, value = self.keys_values(key_input_BTd, rope)
        attended = attend_sequence(
            self.self_attn, self.config, self.queries(input_BTd, rope), key, value, mask_B1TT
        )
        return self.finish(injected_BTd, attended), key, value


@compilable
def unit_norm(state: Tensor, eps: float) -> Tensor:
    """x̂ = RMSNorm(h) without a weight: what every FBS module reads.

    In the backbone norm's own order of operations, so that `weight * unit_norm(h)` is its output to the bit.
    """
    wide = state.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(state.dtype)


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
