"""The order of training data: epochs are permutations, and step s reads the same whatever came before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbs_rl.seeds import stable_hash
from fbs_rl.training.order import DataOrder


@given(count=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_reads_every_sequence_once(count: int, seed: int, epoch: int) -> None:
    found = DataOrder(count, seed).indices(epoch * count, count)
    assert sorted(found.tolist()) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    order = DataOrder(50, seed=1)
    epochs = [tuple(order.indices(50 * epoch, 50)) for epoch in range(4)]
    seeds = [tuple(DataOrder(50, seed).indices(0, 50)) for seed in range(4)]
    assert len({*epochs, *seeds}) == 7  # one in both lists: seed 1, epoch 0
    assert tuple(range(50)) not in epochs


@given(
    count=st.integers(1, 12), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 15), min_size=1, max_size=8)
)  # fmt: skip
def test_a_run_cut_anywhere_reads_the_same_stream(count: int, seed: int, cuts: list[int]) -> None:
    whole = DataOrder(count, seed).indices(0, sum(cuts))
    # One object that reads on, and one made anew for every part, as after a kill.
    going_on, place = DataOrder(count, seed), 0
    for number in cuts:
        wanted = whole[place : place + number]
        assert np.array_equal(going_on.indices(place, number), wanted)
        assert np.array_equal(DataOrder(count, seed).indices(place, number), wanted)
        place += number


def test_parts_may_be_read_in_any_order() -> None:
    order, fresh = DataOrder(7, 3), DataOrder(7, 3)
    backwards = [order.indices(place, 3).tolist() for place in (30, 12, 0, 12)]
    assert backwards == [fresh.indices(place, 3).tolist() for place in (30, 12, 0, 12)]


def test_a_step_may_hold_the_end_of_one_epoch_and_the_start_of_the_next() -> None:
    order = DataOrder(5, seed=2)
    first, second, third = (order.indices(5 * epoch, 5).tolist() for epoch in range(3))
    assert order.indices(3, 4).tolist() == first[3:] + second[:2]
    assert order.indices(4, 8).tolist() == [first[4], *second, *third[:2]]
    assert order.indices(5, 5).tolist() == second
    assert order.indices(5, 0).tolist() == []


def test_one_sequence_is_read_again_and_again() -> None:
    assert DataOrder(1, 0).indices(3, 4).tolist() == [0, 0, 0, 0]


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no sequences to train on"):
        DataOrder(0, 0)


def test_a_large_order_is_even() -> None:
    """Each place of the first ten is each sequence about as often: 2,000 seeds, 10 sequences, 5 deviations."""
    tally = np.zeros((10, 10))
    for seed in range(2000):
        tally[np.arange(10), DataOrder(10, seed).indices(0, 10)] += 1
    assert np.abs(tally - 200).max() < 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_other_processes_read_the_same() -> None:
    """Python's own hash() is salted per process; the order must not be."""
    code = (
        "from fbs_rl.training.order import DataOrder; from fbs_rl.seeds import stable_hash;"
        "print(DataOrder(20, 9).indices(15, 10).tolist(), stable_hash('gate', 1, 2, 3))"
    )
    here = f"{DataOrder(20, 9).indices(15, 10).tolist()} {stable_hash('gate', 1, 2, 3)}"
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )  # fmt: skip
    assert there.stdout.strip() == here


def test_the_order_is_pinned() -> None:
    """A run of an earlier version can be resumed only as long as these stay what they are."""
    assert stable_hash("order", 0, 0) == 4562431825188967250
    assert DataOrder(10, 0).indices(0, 12).tolist() == [7, 6, 1, 2, 9, 8, 4, 5, 0, 3, 3, 6]


def test_hashes_tell_their_parts_apart() -> None:
    parts = [("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), (1, "a"), ("a", 11), ("a", 1, 1)]
    drawn = [stable_hash(*part) for part in parts]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= draw < 2**63 for draw in drawn)
