"""Gangs of Ray actors: what a call gives, and how a dead, late or failing rank ends it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray

from actors.gang import Gang, GangFailure, NoRoom, RankResources, WorkerError
from tests.ray_cluster import LocalCluster


class Echo:
    """A rank that says who it is, fails, sleeps or dies when asked."""

    def __init__(self, rank: int, ranks: int, greeting: str) -> None:
        self.rank, self.ranks, self.greeting = rank, ranks, greeting

    def say(self, *words: str) -> tuple[str, int, int, tuple[str, ...], str | None]:
        return self.greeting, self.rank, self.ranks, words, os.environ.get("FBS_TEST")

    def fail(self, rank: int) -> None:
        if rank == self.rank:
            raise ValueError("of its own")

    def die(self, rank: int) -> None:
        if rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds * self.rank)

    def break_off(self) -> None:
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture(scope="module")
def connected(ray_cluster: LocalCluster) -> Iterator[None]:
    ray.init(ray_cluster.environment["RAY_ADDRESS"], log_to_driver=False)
    yield
    ray.shutdown()


def gather(ranks: int = 2, cpus: float = 1.0, deadline_s: float = 120) -> Gang:
    return Gang.gather(
        "echo", Echo, ranks, RankResources(cpus), ("hello",), deadline_s, {"FBS_TEST": "yes"}
    )


@pytest.fixture
def gang(connected: None) -> Iterator[Gang]:
    made = gather()
    yield made
    made.disband()


def test_results_come_by_rank(gang: Gang) -> None:
    found = gang.call("say", "a", each=[("b",), ("c",)], deadline_s=300)
    assert found == [("hello", 0, 2, ("a", "b"), "yes"), ("hello", 1, 2, ("a", "c"), "yes")]
    with pytest.raises(WorkerError, match="rank 1, fail: ValueError: of its own"):
        gang.call("fail", 1, deadline_s=300)
    with pytest.raises(GangFailure, match="lost a peer during break_off"):
        gang.call("break_off", deadline_s=300)
    with pytest.raises(GangFailure, match=r"ranks \[1\] did not finish sleep within 1 s"):
        gang.call("sleep", 30, deadline_s=1)


def test_the_first_dead_rank_ends_a_call(gang: Gang) -> None:
    gang.call("say", deadline_s=300)
    began = time.monotonic()
    with pytest.raises(GangFailure, match="rank 1 died during die"):
        gang.call("die", 1, deadline_s=300)
    assert time.monotonic() - began < 20  # rank 0 would have slept for 60


def test_no_room_is_found_out_and_room_is_given_back(connected: None) -> None:
    with pytest.raises(NoRoom, match=r"no room for 2 ranks of \{'CPU': 40\} within 1 s"):
        gather(cpus=40, deadline_s=1)
    for _ in range(2):  # of three CPUs: the second gang needs those of the first
        whole = gather(cpus=1.5)
        assert len(whole.call("say", deadline_s=300)) == 2
        whole.disband()
