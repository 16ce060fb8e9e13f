"""Gate traces in the worker: kept to the bit, bounded, taken whole, costed as the reference decoder costs them."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbs_rl.decode.structure import Structure
from fbs_rl.decoding import Generation, decode, measures
from fbs_rl.gate_trace import GateTrace
from fbs_rl.serving.trace_store import TraceStore
from fbs_rl.types import GateMode
from tests.tiny import VOCAB, lively

L = 11  # not a multiple of eight: the last byte of bits is not full


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def some_columns(tokens: int, seed: int = 0, layers: int = L) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "skip": draw.random((tokens, layers)) < 0.4,
        "prob": draw.random((tokens, layers), dtype=np.float32),
        "protected": draw.integers(0, len(Structure) + 1, tokens, dtype=np.uint8),
        "closes": draw.random(tokens) < 0.3,
        "chunks": draw.integers(0, 2**31 - 1, tokens, dtype=np.int32),
    }


def append(
    store: TraceStore, request: str, columns: dict[str, np.ndarray], version: int = 0
) -> None:
    store.append(
        request,
        columns["skip"],
        columns["prob"],
        version,
        columns["protected"],
        columns["closes"],
        columns["chunks"],
    )


def assert_holds(trace: GateTrace, columns: dict[str, np.ndarray]) -> None:
    found = {
        "skip": trace.skip_TL,
        "prob": trace.prob_TL,
        "protected": trace.protected_T,
        "closes": trace.closes_T,
        "chunks": trace.chunks_T,
    }
    for name, array in found.items():
        assert array.dtype == columns[name].dtype and np.array_equal(array, columns[name]), name


def done(store: TraceStore, request: str, key: str | None, tokens: int = 3, seed: int = 0) -> None:
    store.open(request, key, 5, 5)
    append(store, request, some_columns(tokens, seed))
    store.finish(request)


# --- kept ---------------------------------------------------------------------------------------------


def test_a_trace_is_what_was_appended() -> None:
    store, columns = TraceStore(L), some_columns(40)
    store.open("a-1f", "a", 17, 12)
    for start, stop, version in ((0, 1, 3), (1, 1, 3), (1, 30, 3), (30, 40, 4)):
        append(store, "a-1f", {n: x[start:stop] for n, x in columns.items()}, version)
        assert store.length("a-1f") == stop
    store.note_replay("a-1f", 8)
    store.note_replay("a-1f", 3)
    running = store.peek("a-1f")
    assert not running.finished and "a-1f" in store
    trace = store.finish("a-1f")
    assert trace is not None and trace.finished and "a-1f" not in store
    for found in (running, trace, GateTrace.from_wire(store.take(["a"])[0])):
        assert_holds(found, columns)
        assert found.version_T.tolist() == [3] * 30 + [4] * 10
        assert (found.key, found.prompt_tokens, found.decode_start) == ("a", 17, 12)
        assert found.replayed_tokens == 11


@given(
    st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5), max_size=12), st.integers(1, 20)
)
def test_a_step_of_rows_is_one_column_each(steps: list[list[int]], layers: int) -> None:
    together, alone = TraceStore(layers), TraceStore(layers)
    for store in (together, alone):
        for request in range(5):
            store.open(str(request), str(request), 1, 1)
    for version, rows in enumerate(steps):
        columns = some_columns(len(rows), seed=version, layers=layers)
        ids = [str(row) for row in rows]
        together.append_rows(
            ids,
            columns["skip"],
            columns["prob"],
            version,
            columns["protected"],
            columns["closes"],
            columns["chunks"],
        )
        for i, request in enumerate(ids):
            append(alone, request, {n: x[i : i + 1] for n, x in columns.items()}, version)
    assert together.bytes == alone.bytes
    for store in (together, alone):
        for request in range(5):
            store.finish(str(request))
    assert together.take(None) == alone.take(None)


def test_rows_may_come_as_views_and_without_chunks() -> None:
    """As an engine has them: layers first, and no Chunk-Head."""
    store, columns = TraceStore(L), some_columns(2)
    store.open("a", "a", 1, 1)
    store.open("b", "b", 1, 1)
    skip_LB, prob_LB = np.ascontiguousarray(columns["skip"].T), columns["prob"].T.copy()
    store.append_rows(["b", "a"], skip_LB.T, prob_LB.T, 0)
    trace = store.finish("b")
    assert trace is not None and np.array_equal(trace.skip_TL, columns["skip"][:1])
    assert np.array_equal(trace.prob_TL, columns["prob"][:1])
    assert not trace.closes_T.any() and not trace.chunks_T.any() and not trace.protected_T.any()


def test_skips_are_read_back_for_replay() -> None:
    store, columns = TraceStore(L), some_columns(20)
    store.open("a", None, 5, 5)
    append(store, "a", columns)
    read = store.skips("a", 4, 9)
    assert read.dtype == np.bool_ and np.array_equal(read, columns["skip"][4:9])
    assert store.skips("a", 20, 20).shape == (0, L)
    append(store, "a", some_columns(1))  # the history goes on growing while a part of it is held
    for start, stop in ((-1, 3), (5, 4), (0, 22)):
        with pytest.raises(ValueError, match=f"has 21 columns, not {start} to {stop}"):
            store.skips("a", start, stop)


def test_columns_that_do_not_fit_are_refused_and_not_kept() -> None:
    store, columns = TraceStore(L), some_columns(3)
    store.open("a", "a", 5, 5)
    wrong = [
        {**columns, "skip": columns["skip"][:, :-1]},
        {**columns, "prob": columns["prob"][:2]},
        {**columns, "skip": columns["skip"].astype(np.uint8)},
        {**columns, "chunks": columns["chunks"][:2]},
    ]
    for bad in wrong:
        with pytest.raises(ValueError):
            append(store, "a", bad)
    with pytest.raises(KeyError):
        append(store, "b", columns)
    with pytest.raises(KeyError):
        store.append_rows(["a", "b"], columns["skip"][:2], columns["prob"][:2], 0)
    with pytest.raises(ValueError, match="has a trace already"):
        store.open("a", "a", 5, 5)
    assert store.length("a") == 0 and store.bytes == 0


# --- taken --------------------------------------------------------------------------------------------


def test_requests_without_a_key_are_forgotten() -> None:
    store, columns = TraceStore(L), some_columns(4)
    store.open("a", None, 5, 5)
    append(store, "a", columns)
    assert store.bytes > 0
    trace = store.finish("a")
    assert trace is not None and trace.key == ""
    assert_holds(trace, columns)
    assert store.take(None) == [] and store.bytes == 0 and store.finish("a") is None
    assert store.dropped == 0


def test_traces_are_taken_once_in_the_order_of_the_keys() -> None:
    store = TraceStore(L)
    for i, key in enumerate(["a", "b", "a", "c"]):
        done(store, f"{key}-{i}", key, tokens=i + 1)
    taken = store.take(["c", "a", "c"])
    assert [(w["key"], w["tokens"]) for w in taken] == [("c", 4), ("a", 1), ("a", 3)]
    assert [w["key"] for w in store.take(None)] == ["b"]
    assert store.take(None) == store.take([]) == [] and store.bytes == 0


def test_two_running_requests_may_share_a_key() -> None:
    store = TraceStore(L)
    store.open("a-1", "a", 5, 5)
    store.open("a-2", "a", 6, 6)
    append(store, "a-1", some_columns(1))
    append(store, "a-2", some_columns(2))
    store.finish("a-2")
    store.finish("a-1")
    assert [w["prompt_tokens"] for w in store.take(["a"])] == [6, 5]


def test_a_missing_key_takes_nothing() -> None:
    store = TraceStore(L)
    done(store, "a-1", "a")
    with pytest.raises(ValueError) as caught:
        store.take(["a", "b", "c", "d", "e"])
    assert "no trace of 'b', 'c', 'd' and 1 more;" in str(caught.value)
    assert len(store.take(["a"])) == 1


def test_a_running_request_gives_what_there_is_and_nothing_later() -> None:
    store = TraceStore(L)
    store.open("b-1", "b", 5, 5)
    store.append("b-1", np.ones((2, L), bool), np.full((2, L), 0.5), 1)
    (wire,) = store.take(["b"])
    assert (wire["tokens"], wire["finished"]) == (2, 0)
    assert store.skips("b-1", 0, 2).all()
    trace = store.finish("b-1")
    assert trace is not None and store.take(None) == [] and store.bytes == 0


# --- bounded ------------------------------------------------------------------------------------------


def test_finished_traces_go_when_they_are_old() -> None:
    clock = Clock()
    store = TraceStore(L, keep_s=60.0, clock=clock)
    store.open("long", "long", 5, 5)
    append(store, "long", some_columns(2))
    done(store, "a", "a")
    clock.now_s += 30
    done(store, "b", "b")
    clock.now_s += 30
    assert store.drop_stale() == 0  # exactly keep_s old
    clock.now_s += 1
    assert store.drop_stale() == 1 == store.dropped
    assert [w["key"] for w in store.take(None)] == ["b"]
    clock.now_s += 1000
    assert store.drop_stale() == 0 and store.length("long") == 2


def test_the_oldest_go_when_there_are_too_many_and_running_ones_stay() -> None:
    measure = TraceStore(L)
    done(measure, "a", "a", tokens=1)
    size = measure.bytes
    store = TraceStore(L, limit_bytes=10 * size)
    for i in range(4):
        done(store, f"r{i}", f"k{i}", tokens=3)
    assert store.bytes == 9 * size and store.dropped == 1
    store.open("long", "long", 5, 5)
    append(store, "long", some_columns(4))
    assert store.drop_stale() == 1 and store.bytes == 10 * size
    append(store, "long", some_columns(50))
    assert store.drop_stale() == 2 and store.length("long") == 54
    trace = store.finish("long")  # over the limit by itself: returned, not kept
    assert trace is not None and len(trace.skip_TL) == 54
    assert store.dropped == 5 and store.bytes == 0 and store.take(None) == []


# --- wire ---------------------------------------------------------------------------------------------


def trace_of(columns: dict[str, np.ndarray], **changes: Any) -> GateTrace:
    made = GateTrace(
        key="k",
        prompt_tokens=5,
        decode_start=5,
        finished=True,
        skip_TL=columns["skip"],
        prob_TL=columns["prob"],
        version_T=np.arange(len(columns["skip"]), dtype=np.int32),
        protected_T=columns["protected"],
        closes_T=columns["closes"],
        chunks_T=columns["chunks"],
        replayed_tokens=2,
    )
    return replace(made, **changes)


@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("layers", [1, 8, 36])
def test_the_wire_carries_everything_as_plain_values(tokens: int, layers: int) -> None:
    trace = trace_of(some_columns(tokens, layers=layers), finished=False, gates_on=False)
    wire = trace.to_wire()
    assert {type(v) for v in wire.values()} == {str, int, bytes}
    back = GateTrace.from_wire(wire)
    for part in fields(GateTrace):
        one, other = getattr(back, part.name), getattr(trace, part.name)
        assert np.array_equal(one, other) and type(one) is type(other), part.name
    assert len(wire["columns"]) == tokens * (math.ceil(layers / 8) + 4 * layers + 10)
    json.dumps({n: v for n, v in wire.items() if n != "columns"})


def test_a_damaged_wire_is_refused() -> None:
    wire = trace_of(some_columns(4)).to_wire()
    with pytest.raises(ValueError, match="4 tokens of 11 layers have"):
        GateTrace.from_wire({**wire, "columns": wire["columns"][:-1]})
    with pytest.raises(ValueError, match="a trace lacks columns;"):
        GateTrace.from_wire({n: v for n, v in wire.items() if n != "columns"})
    with pytest.raises(ValueError, match=r"skip and prob \[T, L\]"):
        trace_of(some_columns(4), version_T=np.zeros(3, np.int32))


# --- what it says -------------------------------------------------------------------------------------


def test_action_logp_by_hand() -> None:
    columns = some_columns(3, layers=3)
    columns["skip"] = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    columns["prob"] = np.array([[0.5, 0.25, 0], [1.0, 0.75, 0], [0.5, 0.5, 0.5]], np.float32)
    columns["protected"] = np.array([0, 0, 2], np.uint8)
    logp = trace_of(columns).action_logp_TL
    wanted = [[math.log(0.5), math.log(0.75), 0], [0, math.log(0.25), 0], [0, 0, 0]]
    assert logp.dtype == np.float32
    np.testing.assert_allclose(logp, wanted, rtol=1e-6)


def _decoded(kv: str, mode: GateMode, prompt: int, steps: int) -> Generation:
    tokens = iter(torch.randint(0, VOCAB, (steps + 1,), generator=torch.Generator().manual_seed(2)))
    gates: dict[str, Any] = {"tau": 0.5} if mode is GateMode.THRESHOLD else {"gate_seed": 3}
    gates = {} if mode is GateMode.DENSE else gates
    model = lively(kv_on_skip=kv, chunk_cache=2)
    return decode(
        model, list(range(prompt)), steps + 1, lambda _: int(next(tokens)), mode=mode, **gates
    )


@pytest.mark.parametrize("kv", ["project", "noop"])
@pytest.mark.parametrize("mode", [GateMode.THRESHOLD, GateMode.SAMPLE, GateMode.DENSE])
def test_the_cost_is_the_reference_decoders(kv: str, mode: GateMode) -> None:
    made = _decoded(kv, mode, prompt=6, steps=30)
    config = lively(kv_on_skip=kv, chunk_cache=2).config
    assert made.closed_chunks_T is not None and made.opens_T is not None
    assert made.opens_T.any() and made.closed_chunks_T.max() > config.chunk_cache
    store = TraceStore(config.layer_count)
    # As if the tokens had been given: what is counted begins at decode_start, not behind the prompt.
    store.open("a", "a", 36, 6, gates_on=mode is not GateMode.DENSE)
    store.append(
        "a",
        made.skip_LT.T.numpy(),
        made.gate_prob_LT.T.numpy(),
        0,
        closes_n=made.opens_T.numpy(),
        chunks_n=made.closed_chunks_T.numpy(),
    )
    store.note_replay("a", 9)
    store.finish("a")
    cost = GateTrace.from_wire(store.take(["a"])[0]).cost(config)
    wanted = measures(config, made)
    assert int(cost.flops_BT.sum()) == wanted["flops"]["executed"]
    assert int(cost.dense_flops_BT.sum()) == wanted["flops"]["dense"]
    assert cost.skip_ratio == wanted["skip_ratio"] and cost.flops_BT.shape == (1, 30)


def test_an_empty_trace_has_no_cost() -> None:
    config = lively().config
    empty = some_columns(0, layers=config.layer_count)
    with pytest.raises(ValueError, match="no token to count"):
        trace_of(empty).cost(config)
