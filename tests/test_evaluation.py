"""Held-out figures against loops over tokens: documents, padding, two ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fbs_rl.data.shards import PackedRows
from fbs_rl.training.batches import MicroBatch, to_micro_batch
from fbs_rl.training.evaluation import evaluate, find_threshold, macro_f1
from fbs_rl.types import IGNORED_LABEL
from tests.tiny import VOCAB, fresh, lively

T = 20
DOCUMENTS = [
    [0] * T,
    [0] * 7 + [1] * 9 + [2] * 4,
    [0] * 11 + [-1] * 9,
    [0] * 4 + [1] * 10 + [-1] * 6,
    [0] * T,
    [0] * 13 + [1] * 7,
]
STARTS = [5, 3, 5, 6, 0, 5]


def batches(size: int, rows: range = range(6), seed: int = 0) -> list[MicroBatch]:
    draw = np.random.default_rng(seed)
    ids_BT = draw.integers(0, VOCAB, (6, T))
    label_BT = draw.integers(0, 4, (6, T))
    label_BT[:, ::3] = IGNORED_LABEL
    document_BT = np.array(DOCUMENTS, np.int32)
    label_BT[document_BT < 0] = IGNORED_LABEL
    made = []
    for first in rows[::size]:
        part = slice(first, min(first + size, rows.stop))
        packed = PackedRows(
            ids_BT[part], document_BT[part], label_BT[part],
            np.ones(6, np.float32)[part], np.ones(6, np.float32)[part],
        )  # fmt: skip
        starts = STARTS[part]
        made.append(to_micro_batch(packed, starts, [0] * len(starts), None, torch.device("cpu")))
    return made


def alone(sums: Tensor) -> Tensor:
    return sums


def by_hand(model: Any, documents_apart: bool = True, **gates: Any) -> dict[str, Any]:
    """Each row on its own, its padding cut off; every sum in a Python loop."""
    nll, scored, places, skipped, lookahead = 0.0, 0, 0, 0, 0.0
    pairs: list[tuple[int, int]] = []
    for row, (batch, documents) in enumerate(zip(batches(1), DOCUMENTS, strict=True)):
        length = sum(document >= 0 for document in documents)
        ids = batch.ids_BT[:, :length]
        apart = torch.tensor([documents[:length]]) if documents_apart else None
        with torch.no_grad():
            out = model(ids, document_ids=apart, decode_start=STARTS[row], **gates)
        log_prob = out.logits[0].double().log_softmax(-1)
        for t in range(length):
            label = int(batch.chunk_labels.labels_BT[0, t])
            if label >= 0:
                pairs.append((label, int(out.boundary_logits[0, t].argmax())))
            if t < STARTS[row]:
                continue
            places += 1
            skipped += int(out.skip[:, 0, t].sum())
            lookahead += float(out.lookahead[:, 0, t].mean())
            if t + 1 < length and documents[t + 1] == documents[t]:
                nll -= float(log_prob[t, ids[0, t + 1]])
                scored += 1
    return {
        "loss": nll / scored,
        "skip": skipped / places / model.config.layer_count,
        "lookahead": lookahead / places,
        "pairs": pairs,
    }


@pytest.mark.parametrize("size", [1, 2, 6])
def test_dense_figures_equal_a_loop(size: int) -> None:
    model = lively()
    found = evaluate(model, batches(2), batches(size), [], alone)
    wanted = by_hand(model, gates="dense")
    assert found["eval/loss_dense"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["eval/ppl_dense"] == pytest.approx(math.exp(wanted["loss"]), rel=1e-4)
    assert found["eval/lookahead"] == pytest.approx(wanted["lookahead"], rel=1e-5)
    f1 = []
    for cls in range(4):
        hits = sum(label == said == cls for label, said in wanted["pairs"])
        total = sum((label == cls) + (said == cls) for label, said in wanted["pairs"])
        f1.append(2 * hits / total if total else 0.0)
    assert found["eval/boundary_f1"] == pytest.approx(sum(f1) / 4)
    assert set(found) == {"eval/loss_dense", "eval/ppl_dense", "eval/lookahead", "eval/boundary_f1"}


@pytest.mark.parametrize("ratio", [0.2, 0.36])
def test_gated_figures_equal_a_loop_at_the_threshold_found(ratio: float) -> None:
    model = lively()
    found = evaluate(model, batches(3), batches(3), [ratio], alone)
    prefix = f"eval/skip_{round(100 * ratio)}"
    wanted = by_hand(model, gates="threshold", tau=found[f"{prefix}/tau"])
    assert found[f"{prefix}/loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found[f"{prefix}/skip_ratio"] == pytest.approx(wanted["skip"], abs=1e-9)
    assert found[f"{prefix}/skip_ratio"] == pytest.approx(ratio, abs=0.03)
    rates = [v for name, v in found.items() if name.startswith(f"{prefix}/layer_")]
    assert len(rates) == model.config.layer_count
    assert sum(rates) / len(rates) == pytest.approx(wanted["skip"])
    assert all(rates[layer] == 0 for layer in model.config.protected_layers)


def test_a_finer_search_than_bisection_finds_no_better_threshold() -> None:
    """The ratio falls as tau rises; within one cell of the bisection lies the crossing."""
    model, ratio = lively(), 0.3
    tau = find_threshold(model, batches(6), ratio, alone)
    cell = 2 * model.config.gate_logit_clip / 2**7
    logit = math.log(tau / (1 - tau))
    above, below = (
        by_hand(model, gates="threshold", tau=1 / (1 + math.exp(-edge)))["skip"]
        for edge in (logit + cell, logit - cell)
    )
    assert above <= ratio <= below


def test_ratios_beyond_the_free_layers_are_left_out() -> None:
    model = lively(never_skip=(0, 1, 4, 5, 6, 7))
    found = evaluate(model, batches(6), batches(6), [0.05, 0.5], alone)
    assert "eval/skip_5/ppl" in found and "eval/skip_50/ppl" not in found


def test_a_model_without_new_modules_has_dense_figures_only() -> None:
    model = fresh(paw=False, chunk=False, gate=False)
    found = evaluate(model, batches(2), batches(2), [0.2], alone)
    assert set(found) == {"eval/loss_dense", "eval/ppl_dense"}


# --- ranks ------------------------------------------------------------------------------------------


def in_ranks(work: Callable[[int, Callable[[Tensor], Tensor]], Any], ranks: int = 2) -> list[Any]:
    """What `work(rank, reduce)` returns on each rank; ranks are threads that meet in every reduction."""
    shares: list[Tensor | None] = [None] * ranks
    results: list[Any] = [None] * ranks
    meet = threading.Barrier(ranks, timeout=300)

    def run(rank: int) -> None:
        def reduce(sums: Tensor) -> Tensor:
            shares[rank] = sums
            meet.wait()
            total = torch.stack([share for share in shares if share is not None]).sum(0)
            meet.wait()
            return total

        results[rank] = work(rank, reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_ranks_find_what_one_finds() -> None:
    model = lively()
    one = evaluate(model, batches(1), batches(1), [0.3], alone)
    halves = [range(0, 3), range(3, 6)]
    two = in_ranks(
        lambda rank, reduce: evaluate(
            model, batches(1, halves[rank]), batches(1, halves[rank]), [0.3], reduce
        )
    )
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-9)


def test_a_rank_without_rows_scores_nothing() -> None:
    """Its rows are fillers whose gates start after their last token."""
    model = lively()
    one = evaluate(model, batches(3), batches(3), [0.3], alone)

    def share(rank: int) -> list[MicroBatch]:
        made = batches(3)
        if rank:
            for batch in made:
                batch.decode_start_B.fill_(T)
                batch.chunk_labels.labels_BT.fill_(IGNORED_LABEL)
        return made

    two = in_ranks(lambda rank, reduce: evaluate(model, share(rank), share(rank), [0.3], reduce))
    assert two[0] == pytest.approx(one, rel=1e-9)


# --- F1 ---------------------------------------------------------------------------------------------


def test_macro_f1_by_hand() -> None:
    """Rows are labels, columns predictions. B: 2·3/(5+4), I: 2·2/(3+4), O: 2·1/(2+1), S never: 0."""
    confusion = torch.tensor([[3, 1, 0, 0], [1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]).double()
    wanted = (2 * 3 / (4 + 4) + 2 * 2 / (3 + 4) + 2 * 1 / (2 + 1) + 0) / 4
    assert macro_f1(confusion) == pytest.approx(wanted)


def test_macro_f1_of_a_perfect_and_of_an_empty_table() -> None:
    assert macro_f1(torch.eye(4).double() * 7) == 1
    assert macro_f1(torch.zeros(4, 4).double()) == 0
