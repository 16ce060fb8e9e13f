"""The rows of a step: dealt out without loss, drawn for by step and row alone, counted as by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fbs_rl.data.shards import PackedRows, PackedShards
from fbs_rl.model.preview_loss import PreviewDraw
from fbs_rl.training.batches import MicroBatch, StepReader, to_micro_batch
from fbs_rl.training.order import DataOrder
from fbs_rl.types import IGNORED_LABEL
from tests.tiny import fresh, lively
from tests.tiny_training import TOKENS, make_shards

CPU = torch.device("cpu")
SPLITS = [(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> PackedShards:
    return PackedShards.open(make_shards(tmp_path_factory.mktemp("data") / "shards"), "train")


def reader(shards: PackedShards, seed: int = 4, frac: float = 0.5) -> StepReader:
    order = DataOrder(len(shards), seed)
    return StepReader(shards, order, seed, 12, frac, torch.ones(4), CPU)


def rows_of(batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """All rows, one after the other; documents and validity in full."""
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        shape = batch.ids_BT.shape
        found = {
            "ids": batch.ids_BT,
            "labels": batch.labels_BT,
            "document": torch.zeros(shape, dtype=torch.int32) if batch.document_BT is None else batch.document_BT,
            "valid": torch.ones(shape, dtype=torch.bool) if batch.valid_BT is None else batch.valid_BT,
            "chunks": batch.chunk_labels.labels_BT,
            "coverage": batch.chunk_labels.coverage_B,
            "start": batch.decode_start_B,
            "seed": batch.gate_seed_B,
            "gated": batch.gated_BT,
        }  # fmt: skip
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@pytest.mark.parametrize(("ranks", "micro"), SPLITS)
@pytest.mark.parametrize("step", [0, 3])
def test_however_a_step_is_split_it_holds_the_same_rows(
    shards: PackedShards, ranks: int, micro: int, step: int
) -> None:
    made = reader(shards)
    whole = rows_of(made.micro_batches(step, 0, 1, 12))
    dealt = [made.micro_batches(step, rank, ranks, micro) for rank in range(ranks)]
    assert all(len(part) == 12 // ranks // micro for part in dealt)
    assert all(len(batch.ids_BT) == micro for part in dealt for batch in part)
    joined = rows_of([batch for part in dealt for batch in part])
    for name, tensor in whole.items():
        assert torch.equal(joined[name].nan_to_num(), tensor.nan_to_num()), name


def test_a_step_reads_the_rows_that_the_order_names(shards: PackedShards) -> None:
    made = reader(shards)
    for step in range(3):
        wanted = shards.rows(DataOrder(len(shards), 4).indices(12 * step, 12)).ids_BT
        assert np.array_equal(rows_of(made.micro_batches(step, 0, 1, 4))["ids"].numpy(), wanted)


def test_draws_belong_to_a_row_of_a_step(shards: PackedShards) -> None:
    draws = [rows_of(reader(shards).micro_batches(step, 0, 1, 12)) for step in range(40)]
    starts = torch.cat([draw["start"] for draw in draws])
    seeds = torch.cat([draw["seed"] for draw in draws])
    assert len(set(seeds.tolist())) == len(seeds)
    # Uniform over 0 .. T/2 − 1: all values occur about 480/24 = 20 times.
    counts = torch.bincount(starts, minlength=TOKENS // 2)
    assert len(counts) == TOKENS // 2 and counts.min() > 4 and counts.max() < 45
    other = rows_of(reader(shards, seed=5).micro_batches(0, 0, 1, 12))
    assert not torch.equal(other["start"], draws[0]["start"])


@pytest.mark.parametrize(("frac", "largest"), [(0.0, 0), (0.01, 0), (1.0, TOKENS - 1)])
def test_the_start_stays_inside_its_share(shards: PackedShards, frac: float, largest: int) -> None:
    made = reader(shards, frac=frac)
    starts = [b.decode_start_B for step in range(20) for b in made.micro_batches(step, 0, 1, 12)]
    assert int(torch.cat(starts).min()) >= 0 and int(torch.cat(starts).max()) <= largest


# --- one micro-batch --------------------------------------------------------------------------------


def packed(documents: list[list[int]], **changes: Any) -> PackedRows:
    document_BT = np.array(documents, np.int32)
    shape = document_BT.shape
    given = {
        "ids_BT": np.arange(document_BT.size, dtype=np.int64).reshape(shape) % 90,
        "document_BT": document_BT,
        "chunk_label_BT": np.full(shape, IGNORED_LABEL, np.int64),
        "coverage_B": np.full(shape[0], np.nan, np.float32),
        "chinese_frac_B": np.zeros(shape[0], np.float32),
    }
    return PackedRows(**{**given, **changes})


def batch_of(documents: list[list[int]], starts: list[int], **changes: Any) -> MicroBatch:
    return to_micro_batch(packed(documents, **changes), starts, [0] * len(starts), None, CPU)


def test_what_is_trivial_is_left_out() -> None:
    plain = batch_of([[0, 0, 0]], [1])
    assert plain.document_BT is None and plain.valid_BT is None and plain.tokens == 3
    several = batch_of([[0, 0, 1], [0, 0, 0]], [1, 1])
    assert several.document_BT is not None and several.valid_BT is None
    padded = batch_of([[0, 0, -1], [0, 0, 0]], [1, 1])
    assert padded.document_BT is None and padded.valid_BT is not None and padded.tokens == 5


def test_padding_has_no_label_and_no_gate() -> None:
    batch = batch_of([[0, 0, 1, -1, -1], [0, 0, 0, 0, 0]], [1, 3])
    assert batch.labels_BT.tolist() == [[0, 1, 2, IGNORED_LABEL, IGNORED_LABEL], [5, 6, 7, 8, 9]]
    assert batch.gated_BT.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert batch.document_BT is not None
    assert batch.document_BT.tolist() == [[0, 0, 1, -1, -1], [0] * 5]


def test_chunk_labels_come_along() -> None:
    labels = np.array([[0, 1, 2]], np.int64)
    batch = batch_of([[0, 0, 0]], [0], chunk_label_BT=labels, coverage_B=np.array([0.5], np.float32))  # fmt: skip
    assert batch.chunk_labels.labels_BT.tolist() == labels.tolist()
    assert batch.chunk_labels.coverage_B.tolist() == [0.5]
    assert batch.chunk_labels.force_cross_entropy is False


def test_gates_act_where_the_model_says_they_do() -> None:
    model = lively()
    documents = [[0] * 12, [0] * 5 + [1] * 7, [0] * 8 + [-1] * 4]
    batch = batch_of(documents, [3, 0, 6])
    out = model(
        batch.ids_BT, batch.valid_BT, document_ids=batch.document_BT, decode_start=batch.decode_start_B,
        gates="threshold", tau=0.0,
    )  # fmt: skip
    free = next(
        i for i in range(model.config.layer_count) if i not in model.config.protected_layers
    )
    assert torch.equal(out.skip[free], batch.gated_BT)
    assert torch.equal(out.taps.gated_BT, batch.gated_BT)


# --- counts -----------------------------------------------------------------------------------------

DOCUMENTS = [
    [0] * 14,
    [0] * 3 + [1] * 4 + [2] * 7,
    [0] * 5 + [1] * 2 + [-1] * 7,
    [0] + [-1] * 13,
]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("draw", [0, 1, 2])
def test_counts_are_those_of_a_loop_over_tokens(every: int, draw: int) -> None:
    config = fresh(loss_preview_every=every).config
    starts = [0, 5, 3, 1]
    batch = batch_of(DOCUMENTS, starts)
    horizon, first = config.paw_horizon, PreviewDraw.of(config, draw).first
    lm = preview = window = gated = 0
    for documents, start in zip(DOCUMENTS, starts, strict=True):
        for t, document in enumerate(documents):
            known = [
                t + h < len(documents) and documents[t + h] == document
                for h in range(1, horizon + 1)
            ]
            if document < 0:
                continue
            lm += known[0]
            gated += t >= start
            if t % every == first % every and t >= first:
                preview += any(known)
                window += all(known)
    counts = batch.counts(config, draw)
    assert (counts.lm, counts.preview, counts.window, counts.gated, counts.rows) == (
        lm, preview, window, gated, 4,
    )  # fmt: skip


def test_counts_of_parts_add_up(shards: PackedShards) -> None:
    config, made = fresh().config, reader(shards)
    totals = set()
    for ranks, micro in SPLITS:
        parts = itertools.chain(
            *(made.micro_batches(2, rank, ranks, micro) for rank in range(ranks))
        )
        counts = [b.counts(config, 2) for b in parts]
        rows = [(c.lm, c.preview, c.window, c.gated, c.rows) for c in counts]
        totals.add(tuple(map(sum, zip(*rows, strict=True))))
    assert len(totals) == 1


def test_in_dense_rows_no_gate_acts_and_the_others_are_as_they_were(shards: PackedShards) -> None:
    plain = [rows_of(reader(shards).micro_batches(step, 0, 1, 12)) for step in range(40)]
    mixed_reader = dataclasses.replace(reader(shards), dense_rows_frac=0.3)
    mixed = [rows_of(mixed_reader.micro_batches(step, 0, 1, 12)) for step in range(40)]
    dense = torch.cat([rows["start"] == TOKENS for rows in mixed])
    assert 0.2 < float(dense.float().mean()) < 0.4
    for before, after in zip(plain, mixed, strict=True):
        kept = after["start"] < TOKENS
        assert torch.equal(after["start"][kept], before["start"][kept])
        assert not after["gated"][~kept].any()
