"""The closing rule, chunk means, distance buckets and the gradient path of the boundary head (SPEC 3)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.chunk_head import chunk_means, close_probability, distance_bucket, segment
from fbs_rl.types import BIOS
from tests.reference_math import bucket
from tests.tiny import enliven, fresh, left_padded

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def logits_of(*rows: str) -> Tensor:
    """Boundary logits [B, T, 4] whose classes spell the rows."""
    return torch.stack(
        [F.one_hot(torch.tensor([BIOS.index(c) for c in row]), 4).float() for row in rows]
    )


@pytest.mark.parametrize(
    ("labels", "chunks", "visible"),
    [
        ("BIIS", "0001", "0000"),  # the S closes [B I I], which shows from the next token on
        ("BISBI", "00122", "00012"),
        ("BBIIOO", "011123", "001112"),
        ("III", "012", "001"),  # an I that continues nothing stands alone
        ("SIBI", "0122", "0012"),
        ("OIIBIOI", "0123345", "0012334"),
        ("IBIIIIB", "0111112", "0011111"),
    ],
)
def test_closing_rule_by_hand(labels: str, chunks: str, visible: str) -> None:
    found = segment(logits_of(labels))
    assert found.chunk_id_BT[0].tolist() == [int(c) for c in chunks]
    assert found.visible_BT[0].tolist() == [int(c) for c in visible]
    assert found.chunks == int(chunks[-1]) + 1
    firsts = [t == 0 or chunks[t] != chunks[t - 1] for t in range(len(chunks))]
    assert found.opens_BT[0].tolist() == firsts


def scan(labels: str, valid: list[bool], document: list[int]) -> list[tuple[int, int, int]]:
    """(chunk, chunks closed before, first chunk of the document) of each valid token, token by token."""
    rows, chunk, closed, first, open_label, current = [], -1, 0, 0, "", None
    for label, is_token, name in zip(labels, valid, document, strict=True):
        if not is_token:
            continue
        fresh_document = name != current
        if fresh_document or not (label == "I" and open_label == "B"):
            seen_before, closed = closed, closed + (chunk >= 0)
            chunk += 1
            open_label = label
        else:
            seen_before = closed
        if fresh_document:
            current, first = name, chunk
        rows.append((chunk, seen_before, first))
    return rows


@st.composite
def labelled_batches(draw: st.DrawFn) -> tuple[list[str], list[list[bool]], list[list[int]]]:
    width, rows = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    labels, valid, documents = [], [], []
    for _ in range(rows):
        labels.append(draw(st.text("BIIOS", min_size=width, max_size=width)))
        left = draw(st.integers(0, width - 1))
        right = draw(st.integers(left + 1, width))
        valid.append([left <= t < right for t in range(width)])
        borders = draw(st.lists(st.booleans(), min_size=width, max_size=width))
        documents.append([sum(borders[: t + 1]) for t in range(width)])
    return labels, valid, documents


@PROPERTY
@given(labelled_batches(), st.booleans())
def test_closing_rule_equals_a_scan(batch: tuple, packed: bool) -> None:
    labels, valid, documents = batch
    if not packed:
        documents = [[0] * len(row) for row in documents]
    valid_BT = torch.tensor(valid)
    found = segment(logits_of(*labels), valid_BT, torch.tensor(documents) if packed else None)
    wanted = [scan(*row) for row in zip(labels, valid, documents, strict=True)]
    assert found.chunks == max(row[-1][0] for row in wanted) + 1
    for row, expected in enumerate(wanted):
        mask = valid_BT[row]
        assert found.chunk_id_BT[row][mask].tolist() == [c for c, _, _ in expected]
        assert found.first_BT[row][mask].tolist() == [f for _, _, f in expected]
        assert found.chunk_id_BT[row][~mask].eq(-1).all() and not found.opens_BT[row][~mask].any()
        # A token that begins a document sees nothing of it, however many were closed before.
        for t, (_, closed, first) in zip(mask.nonzero()[:, 0].tolist(), expected, strict=True):
            assert max(found.visible_BT[row, t].item(), first) == max(closed, first)


@PROPERTY
@given(labelled_batches())
def test_chunk_means_equal_loops(batch: tuple) -> None:
    labels, valid, _ = batch
    valid_BT = torch.tensor(valid)
    found = segment(logits_of(*labels), valid_BT)
    values = torch.randn(*valid_BT.shape, 3, generator=torch.Generator().manual_seed(1))
    means = chunk_means(values, found)
    assert means.shape == (len(labels), found.chunks, 3)
    for row in range(len(labels)):
        for chunk in range(found.chunks):
            members = [t for t, c in enumerate(found.chunk_id_BT[row].tolist()) if c == chunk]
            wanted = sum((values[row, t] for t in members), torch.zeros(3)) / max(len(members), 1)
            torch.testing.assert_close(means[row, chunk], wanted)


def test_chunk_means_stay_exact_behind_huge_values() -> None:
    """Long sequences with outliers a hundred thousand times the rest, as pretrained models have them."""
    length = 6000
    draw = torch.Generator().manual_seed(2)
    values = torch.randn(1, length, 4, generator=draw)
    values[0, ::500] *= 1e5
    labels = "B" + "I" * 6 + "S" + "O"
    found = segment(logits_of((labels * (length // len(labels) + 1))[:length]))
    means = chunk_means(values, found)[0]
    owner = found.chunk_id_BT[0]
    for chunk in range(found.chunks):
        wanted = values[0, owner == chunk].double().mean(0)
        torch.testing.assert_close(means[chunk].double(), wanted, atol=1e-6, rtol=1e-6)


# --- distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "reach"), [(32, 512), (8, 100), (4, 6), (2, 2), (1, 5), (32, 6)]
)
def test_distance_buckets_rise_and_end_at_the_last(buckets: int, reach: int) -> None:
    found = distance_bucket(torch.arange(reach), buckets, reach)
    steps = found.diff()
    assert found[0] == 0 and (steps >= 0).all() and found.max() <= buckets - 1
    half = min(buckets // 2, reach)
    assert found[:half].tolist() == list(range(half))
    if reach > buckets:
        assert found[-1] == buckets - 1 and found.unique().numel() == buckets


@pytest.mark.parametrize(("buckets", "reach"), [(32, 512), (8, 100), (4, 6), (16, 300)])
def test_distance_buckets_equal_the_formula(buckets: int, reach: int) -> None:
    found = distance_bucket(torch.arange(reach), buckets, reach).tolist()
    assert found == [bucket(d, buckets, reach) for d in range(reach)]


# --- gradient to the boundary head (SPEC 3.4) -----------------------------------------------------------


def test_closed_chunks_weigh_one_with_the_gradient_of_p_close() -> None:
    logits = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found = segment(logits)
    upstream = torch.randn(found.close_weight_BN.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found.close_weight_BN, torch.ones_like(found.close_weight_BN))
    (grad,) = torch.autograd.grad((found.close_weight_BN * upstream).sum(), logits)
    total = torch.zeros(())
    prob = close_probability(logits)
    for row in range(2):
        for t in range(9):
            chunk = int(found.chunk_id_BT[row, t])
            if found.opens_BT[row, t] and chunk > 0:  # t closes the chunk before its own
                total = total + upstream[row, chunk - 1] * prob[row, t]
    torch.testing.assert_close(grad, torch.autograd.grad(total, logits)[0])


def test_close_probability_is_all_but_inside() -> None:
    logits = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]))
    torch.testing.assert_close(close_probability(logits), torch.tensor([[0.8]]))


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_the_language_loss_reaches_the_boundary_head(strength: float) -> None:
    """Through the weights of the closed chunks alone, hence only where the readers are switched on."""
    model = enliven(fresh())
    for layer in model.model.layers:
        if layer.chunk_reader is not None:
            layer.chunk_reader.strength.data.fill_(strength)
    ids, mask = left_padded(5, [16, 12])
    found = model(ids, mask, gates="dense")
    nll = -found.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    nll[mask[:, 1:] == 1].mean().backward()
    grad = model.model.boundary.classify.weight.grad
    assert bool(grad[:4].abs().max() > 1e-4) == (strength > 0)
    assert not grad[4].any()  # the blank belongs to CTC
