"""Self-attention over a sequence and over a cache: masks, rotary positions, the products themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from fbs_rl.model.document_attention import attend_documents


def rotate(x_BHTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, in the backbone's own order of operations (bit-equal to it)."""
    cos_B1TD, sin_B1TD = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
    return (x_BHTD * cos_B1TD) + (rotate_half(x_BHTD) * sin_B1TD)


def sequence_mask(
    length: int,
    device: torch.device,
    valid_BT: Tensor | None = None,
    document_BT: Tensor | None = None,
) -> Tensor | None:
    """[B, 1, T, T] bool, True where a query (dim 2) may read a key (dim 3); None for plain causal.

    valid_BT: False on padding. document_BT: a query reads its own document only.
    """
    if valid_BT is None and document_BT is None:
        return None
    mask = _causal(length, device)
    if valid_BT is not None:
        mask = mask & valid_BT[:, None, :]
    if document_BT is not None:
        mask = mask & (document_BT[:, :, None] == document_BT[:, None, :])
    # The diagonal keeps the softmax of padding defined; it is not read.
    return (mask | torch.eye(length, dtype=torch.bool, device=device))[:, None]


def without_keys(mask_B1TT: Tensor | None, absent_BT: Tensor) -> Tensor:
    """The mask without keys that left no entry (`noop`); a token always reads itself, since if it runs it has one."""
    length, device = absent_BT.shape[1], absent_BT.device
    if mask_B1TT is None:
        mask_B1TT = _causal(length, device)[:, None]
    own_TT = torch.eye(length, dtype=torch.bool, device=device)
    return (mask_B1TT & ~absent_BT[:, None, None, :]) | own_TT


def _causal(length: int, device: torch.device) -> Tensor:
    column_T = torch.arange(length, device=device)
    return (column_T[:, None] >= column_T[None, :])[None]


def attend_sequence(
    attention: nn.Module,
    config: PreTrainedConfig,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    mask_B1TT: Tensor | BlockMask | None,
) -> Tensor:
    """[B, T, H*D] through the attention implementation that the configuration names, or block by block.

    attention: the backbone's own module, of which scaling and head counts are read.
    """
    if isinstance(mask_B1TT, BlockMask):
        scaling: Any = attention.scaling
        return attend_documents(query_BHTD, key_BGTD, value_BGTD, mask_B1TT, scaling)
    implementation = config._attn_implementation or "sdpa"
    if implementation == "eager":
        # The eager form adds its mask to the scores and knows no implicit causality.
        if mask_B1TT is None:
            length = query_BHTD.shape[2]
            mask_B1TT = torch.ones(
                length, length, dtype=torch.bool, device=query_BHTD.device
            ).tril()[None, None]
        lowest = torch.finfo(query_BHTD.dtype).min
        mask_B1TT = torch.zeros_like(mask_B1TT, dtype=query_BHTD.dtype).masked_fill(
            ~mask_B1TT, lowest
        )
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    out_BTHD, _ = attend(
        attention,
        query_BHTD,
        key_BGTD,
        value_BGTD,
        mask_B1TT,
        dropout=0.0,
        scaling=attention.scaling,
    )
    return out_BTHD.reshape(*out_BTHD.shape[:2], -1)


def attend_step(
    query_BHD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, entry_BS: Tensor | None, scaling: float
) -> Tensor:
    """[B, H*D] for one query a row over S cached entries; entry_BS marks which of them exist.

    The H/G query heads that share a key head are laid out as queries, so keys are not repeated.
    """
    batch, groups = key_BGSD.shape[:2]
    query = query_BHD.view(batch, groups, -1, query_BHD.shape[-1])
    mask = None if entry_BS is None else entry_BS[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key_BGSD, value_BGSD, attn_mask=mask, scale=scaling)
    return out.reshape(batch, -1)
