"""Attention inside the documents of packed sequences, which reads no block of keys that no query may see.

A dense mask costs a long sequence as much as full attention would. Here the mask is a table of blocks: most lie
above the diagonal or between documents and are passed over, those inside one document need no mask at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128
_PADDING = 2**30


def document_blocks(document_BT: Tensor) -> BlockMask:
    """Which blocks of keys the queries of each block may read: causal, inside a document.

    document_BT: ascending along a row, −1 on the padding at its end.
    """
    document_BT = document_BT.masked_fill(document_BT < 0, _PADDING).contiguous()
    length = document_BT.shape[1]
    blocks = -(-length // _BLOCK)
    every_N = torch.arange(blocks, device=document_BT.device)
    first_BN = document_BT[:, every_N * _BLOCK]
    last_BN = document_BT[:, ((every_N + 1) * _BLOCK - 1).clamp_max(length - 1)]
    below_NN = every_N[:, None] > every_N[None, :]
    seen_BNN = (last_BN[:, None, :] >= first_BN[:, :, None]) & (
        every_N[:, None] >= every_N[None, :]
    )
    whole_BNN = below_NN & (first_BN[:, None, :] == last_BN[:, :, None])

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[batch, query] == document_BT[batch, key])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BNN & ~whole_BNN),
        *_listed(whole_BNN),
        BLOCK_SIZE=_BLOCK,
        mask_mod=reads,
        seq_lengths=(length, length),
    )


def attend_documents(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, mask: BlockMask, scaling: float
) -> Tensor:
    """[B, T, H*D]; to be called from compiled code, where it becomes one kernel."""
    out: Any = flex_attention(
        query_BHTD, key_BGTD, value_BGTD, block_mask=mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2)


def _listed(chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """(how many blocks of keys, their indices first in each row) as [B, 1, N] and [B, 1, N, N]."""
    chosen = chosen_BNN.to(torch.int32).unsqueeze(1)
    order = chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(-1).to(torch.int32), order.contiguous()
