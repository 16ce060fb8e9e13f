"""Attention block by block against the dense mask of the same packed documents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.attention import attend_sequence, sequence_mask
from fbs_rl.model.document_attention import attend_documents, document_blocks
from tests.tiny import fresh

LENGTHS = [64, 128, 300, 512]


def documents(length: int) -> Tensor:
    """Rows of one, of two, and of many documents; the last one ends in padding."""
    column_T = torch.arange(length)
    rows = [column_T * 0, (column_T >= length // 3).long(), column_T // 7]
    rows.append(torch.where(column_T < length - 40, column_T // 150, -1))
    return torch.stack(rows)


def dense_mask(document_BT: Tensor) -> Tensor:
    mask = sequence_mask(document_BT.shape[1], document_BT.device, document_BT >= 0, document_BT)
    assert mask is not None
    return mask


def heads(count: int, length: int, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, count, length, 16, generator=generator).to(device)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_cover_what_the_mask_shows_and_whole_ones_nothing_else(length: int) -> None:
    """Forward (blocks of keys) and backward (blocks of queries) tables name the same pairs of blocks."""
    document_BT = documents(length)
    made, blocks = document_blocks(document_BT), -(-length // 128)
    shown = F.pad(dense_mask(document_BT)[:, 0], (0, -length % 128, 0, -length % 128))
    shown_BNNXX = shown.unflatten(1, (blocks, 128)).unflatten(3, (blocks, 128)).transpose(2, 3)
    needed_BNN = shown_BNNXX.any(-1).any(-1)
    tables = []
    for count, index in (
        (made.kv_num_blocks, made.kv_indices),
        (made.full_kv_num_blocks, made.full_kv_indices),
        (made.q_num_blocks, made.q_indices),
        (made.full_q_num_blocks, made.full_q_indices),
    ):
        assert count is not None and index is not None
        table = torch.zeros(4, blocks, blocks, dtype=torch.bool)
        for row in range(4):
            for one in range(blocks):
                table[row, one, index[row, 0, one, : count[row, 0, one]].long()] = True
        tables.append(table)
    partial, whole, partial_t, whole_t = tables
    assert not (needed_BNN & ~(partial | whole)).any()
    inside = shown_BNNXX.all(-1).all(-1)
    # In the last row padding reads padding, which the dense mask hides; nobody looks at it.
    assert (inside | ~whole)[:3, : length // 128, : length // 128].all()
    assert torch.equal(partial.transpose(1, 2), partial_t)
    assert torch.equal(whole.transpose(1, 2), whole_t)


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_in_blocks_equals_the_dense_mask(length: int) -> None:
    document_BT = documents(length)
    query, key, value = heads(4, length, 0), heads(2, length, 1), heads(2, length, 2)
    found = attend_documents(query, key, value, document_blocks(document_BT), 0.3)
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(document_BT), scale=0.3, enable_gqa=True
    )
    real_BT = document_BT >= 0
    torch.testing.assert_close(found[real_BT], wanted.transpose(1, 2).flatten(2)[real_BT])


def test_layers_take_either_mask() -> None:
    model = fresh(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    attention = model.get_submodule("model.layers.0.self_attn")
    document_BT = documents(128)
    tensors = heads(4, 128, 0), heads(2, 128, 1), heads(2, 128, 2)
    masks = document_blocks(document_BT), dense_mask(document_BT)
    found, wanted = (attend_sequence(attention, model.config, *tensors, mask) for mask in masks)
    real_BT = document_BT >= 0
    torch.testing.assert_close(found[real_BT], wanted[real_BT])


@pytest.fixture
def compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gradients_in_blocks_equal_the_dense_mask(compiled: None) -> None:
    document_BT = documents(512).cuda()
    real_BT = document_BT >= 0
    found = []
    for way in ("blocks", "mask"):
        tensors = [heads(n, 512, s, "cuda").requires_grad_() for s, n in enumerate((4, 2, 2))]
        if way == "blocks":
            attend = torch.compile(attend_documents)
            out = attend(*tensors, document_blocks(document_BT), 0.3)
        else:
            out = F.scaled_dot_product_attention(
                *tensors, attn_mask=dense_mask(document_BT), scale=0.3, enable_gqa=True
            )
            out = out.transpose(1, 2).flatten(2)
        weight = heads(4, 512, 7, "cuda").transpose(1, 2).flatten(2)
        found.append(torch.autograd.grad((out * weight)[real_BT].sum(), tensors))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)  # TF32 inside the kernel
