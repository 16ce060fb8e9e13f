"""What a token's results may not depend on: later tokens, padding, other rows, other documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fbs_rl.types import FBSOutput
from tests.tiny import NOOP, VOCAB, assert_same, left_padded, lively

PROPERTY = settings(max_examples=15, deadline=None, derandomize=True, database=None)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"family": "qwen3", **NOOP},
    {"gate_block": 2, "kv_on_skip": "noop"},
    {"gate_ahead": 1},
    {"paw_compression": "none", "chunk_cache": 2, "segment_position": True},
]
GATES: list[dict[str, Any]] = [
    {"gates": "dense"},
    {"gates": "threshold", "tau": 0.5},
    {"gates": "sample", "gate_seed": 29},
]
options = st.sampled_from(OPTIONS)
gatings = st.sampled_from(GATES)


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def columns(output: FBSOutput, part: slice, rows: slice = slice(None)) -> FBSOutput:
    """The output of some rows and columns of a batch."""
    assert output.logits is not None and output.skip is not None
    assert output.gate_prob is not None and output.boundary_logits is not None
    return FBSOutput(
        logits=output.logits[rows, part],
        skip=output.skip[:, rows, part],
        gate_prob=output.gate_prob[:, rows, part],
        lookahead=output.lookahead[:, rows, part],
        boundary_logits=output.boundary_logits[rows, part],
    )


@PROPERTY
@given(options, gatings, st.integers(0, 10**6), st.integers(1, 17))
def test_later_tokens_change_nothing_before(
    config: dict[str, Any], gates: dict[str, Any], seed: int, kept: int
) -> None:
    model = lively(**config)
    ids = tokens(seed, 2, 18)
    other = torch.cat((ids[:, :kept], tokens(seed + 1, 2, 18 - kept)), dim=1)
    with torch.no_grad():
        one, two = model(ids, **gates), model(other, **gates)
        short = model(ids[:, :kept], **gates)
    before = slice(0, kept)
    assert_same(columns(two, before), columns(one, before))
    assert_same(short, columns(one, before))


def test_later_tokens_do_change_what_follows() -> None:
    model, ids = lively(), tokens(0, 2, 18)
    other = torch.cat((ids[:, :9], tokens(1, 2, 9)), dim=1)
    with torch.no_grad():
        one, two = model(ids, gates="dense"), model(other, gates="dense")
    for name in ("logits", "boundary_logits"):
        gap = (getattr(one, name) - getattr(two, name)).abs().amax((0, 2))
        assert (gap[9:] > 1e-3).all()
    gap = (one.lookahead - two.lookahead).abs().amax((0, 1))
    assert (gap[9:] > 1e-3).all()


@pytest.mark.parametrize("gates", GATES, ids=lambda g: g["gates"])
@pytest.mark.parametrize("config", OPTIONS, ids=["default", "paper", "blocks", "ahead", "variants"])
def test_no_gradient_flows_from_later_tokens(config: dict[str, Any], gates: dict[str, Any]) -> None:
    """The strict form of suffix invariance for everything that is differentiable."""
    if config.get("segment_position"):
        config = {**config, "segment_position": False}  # which needs token ids
    model = lively(**config)
    embeds = model.model.embed_tokens(tokens(3, 1, 12)).detach().requires_grad_()
    found = model(inputs_embeds=embeds, **gates)
    t = 6
    total = found.logits[0, t].square().sum() + found.boundary_logits[0, t].square().sum()
    total = total + found.lookahead[:, 0, t].sum() + found.gate_prob[:, 0, t].sum()
    (grad,) = torch.autograd.grad(total, embeds)
    assert torch.equal(grad[0, t + 1 :], torch.zeros_like(grad[0, t + 1 :]))
    assert grad[0, t].abs().max() > 1e-3 and grad[0, : t - 1].abs().max() > 1e-4


@PROPERTY
@given(
    options, gatings, st.integers(0, 10**6), st.lists(st.integers(1, 15), min_size=2, max_size=4)
)
def test_padding_changes_nothing(
    config: dict[str, Any], gates: dict[str, Any], seed: int, lengths: list[int]
) -> None:
    """Each left-padded row equals the row alone without padding, whatever the other rows hold."""
    model = lively(**config)
    ids, mask = left_padded(seed, lengths)
    with torch.no_grad():
        together = model(ids, mask, decode_start=2, **gates)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, -length:], decode_start=2, **gates)
            found = columns(together, slice(ids.shape[1] - length, None), slice(row, row + 1))
            assert_same(found, alone)


def test_right_padding_changes_nothing() -> None:
    model = lively(**OPTIONS[1])
    ids = tokens(4, 2, 15)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        together = model(ids, mask, gates="threshold", tau=0.5)
        alone = model(ids[:1, :9], gates="threshold", tau=0.5)
    assert_same(columns(together, slice(0, 9), slice(0, 1)), alone)


@PROPERTY
@given(options, gatings, st.integers(0, 10**6))
def test_other_rows_change_nothing(
    config: dict[str, Any], gates: dict[str, Any], seed: int
) -> None:
    model = lively(**config)
    ids = tokens(seed, 3, 14)
    other = ids.clone()
    other[[0, 2]] = tokens(seed + 1, 2, 14)
    with torch.no_grad():
        one, two = model(ids, **gates), model(other, **gates)
    assert_same(columns(two, slice(None), slice(1, 2)), columns(one, slice(None), slice(1, 2)))


@PROPERTY
@given(options, gatings, st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_packed_documents_equal_each_document_alone(
    config: dict[str, Any], gates: dict[str, Any], seed: int, lengths: list[int]
) -> None:
    model = lively(**config)
    parts = [tokens(seed + i, 1, n) for i, n in enumerate(lengths)]
    names = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[: len(lengths)]
    documents = names.repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(
            torch.cat(parts, 1),
            position_ids=positions,
            document_ids=documents,
            decode_start=1,
            **gates,
        )
        start = 0
        for part in parts:
            alone = model(part, decode_start=1, **gates)
            stop = start + part.shape[1]
            assert_same(columns(packed, slice(start, stop)), alone)
            start = stop


def test_packed_rows_may_end_in_padding() -> None:
    model = lively()
    ids, documents = tokens(5, 1, 14), torch.tensor([[0] * 6 + [1] * 8])
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    positions = torch.cat((torch.arange(6), torch.arange(8))).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, mask, positions, document_ids=documents, gates="threshold", tau=0.5)
        alone = model(ids[:, 6:11], gates="threshold", tau=0.5)
    assert_same(columns(packed, slice(6, 11)), alone)


def test_documents_matter() -> None:
    model, ids = lively(), tokens(6, 1, 14)
    documents = torch.tensor([[0] * 6 + [1] * 8])
    positions = torch.cat((torch.arange(6), torch.arange(8))).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, document_ids=documents, gates="dense")
        joined = model(ids, position_ids=positions, gates="dense")
    gap = (packed.logits - joined.logits).abs().amax((0, 2))
    assert gap[:6].max() == 0 and (gap[6:] > 1e-3).all()
