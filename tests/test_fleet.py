"""The rollout fleet on a real cluster: the same episodes whoever dies, equal gates, errors that say why."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.fleet import FleetFailure, FleetSettings, RolloutFleet
from actors.gang import NoRoom, RankResources, WorkerError
from actors.rollout_worker import worker_environment
from fbs_rl.gate_bundle import GateBundle
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings, RolloutTask
from tests.ray_cluster import LocalCluster
from tests.served_engine import changed_gates
from tests.served_tiny import make_folder
from tests.test_rollouts import OPTIONS, bits, make_tasks

SETTINGS = FleetSettings(workers=2, resources=RankResources(1), start_deadline_s=300)
GATED = RolloutSettings(sampled_by=Sampler.GATED, max_new_tokens=30, temperature=1.0)
CHUNKS = [make_tasks(3, samples=3, first=10 * i) for i in range(6)]


@pytest.fixture(scope="module")
def connected(ray_cluster: LocalCluster) -> Iterator[None]:
    ray.shutdown()  # an earlier module's commands may have left this process connected
    ray.init(ray_cluster.environment["RAY_ADDRESS"], log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    make_folder(place)
    return str(place)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def fleet(connected: None, folder: str, said: list[str]) -> Iterator[RolloutFleet]:
    with RolloutFleet.start("test", folder, OPTIONS, SETTINGS, said.append) as made:
        yield made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> GateBundle:
    model = make_folder(tmp_path_factory.mktemp("trained"))
    return changed_gates(model, 1, "gates+paw")


def flat(chunks: list[list[EpisodeRollout]]) -> list[Any]:
    return [bits(episodes) for episodes in chunks]


def kill_during(fleet: RolloutFleet, chunks: Any, index: int, after_s: float) -> list[Any]:
    """Rolls `chunks`; the worker in place `index` is killed by the system after `after_s`."""
    facts = fleet.facts[index]
    assert facts is not None
    timer = threading.Timer(after_s, os.kill, (facts.pid, signal.SIGKILL))
    timer.start()
    try:
        return flat(fleet.roll(chunks, GATED))
    finally:
        timer.join()


def test_killed_workers_change_no_bit(
    fleet: RolloutFleet, bundle: GateBundle, said: list[str]
) -> None:
    fleet.take_figures()
    folders_own = flat(fleet.roll(CHUNKS, GATED))
    fleet.sync(bundle)
    wanted = flat(fleet.roll(CHUNKS, GATED))
    assert wanted != folders_own and wanted[0][0][3] == fleet.version == 1
    figures = fleet.take_figures()
    assert (figures.chunks, figures.episodes, figures.replacements) == (12, 12 * 9, 0)
    assert figures.sync_bytes == 2 * len(bundle.pack())
    assert figures.work.generated_tokens == 12 * 9 * 30
    pids = [facts.pid for facts in fleet.facts if facts]
    found = kill_during(fleet, CHUNKS * 3, 1, after_s=1.0)
    assert found == wanted * 3
    assert len(said) == 1 and "fbs-test-rollout-1 died in its chunk" in said[0]
    assert "fbs-test-rollout-1-1 takes its place" in said[0]
    # The next gates wait for the new worker, which then works like the others.
    later = GateBundle.of(2, bundle.tensors)
    fleet.sync(later)
    now = [facts.pid for facts in fleet.facts if facts]
    assert now[0] == pids[0] and now[1] != pids[1]
    again = fleet.roll(CHUNKS, GATED)
    assert {e.version for episodes in again for e in episodes} == {2}
    own = [e.segments[0].token_ids for episodes in again for e in episodes]
    assert own == [row[4][3] for chunk in wanted for row in chunk]
    record = fleet.take_figures().record()
    assert record["rollout/replacements"] == 1 and record["sync/sync_s"] > 0
    assert record["rollout/generated_tokens"] == 4 * 6 * 9 * 30


def test_which_worker_rolls_a_chunk_does_not_matter(fleet: RolloutFleet) -> None:
    alone = [fleet.roll([chunk], GATED)[0] for chunk in CHUNKS]
    assert flat(alone) == flat(fleet.roll(CHUNKS, GATED))
    backwards = fleet.roll(CHUNKS[::-1], GATED)
    assert flat(backwards[::-1]) == flat(alone)
    assert fleet.roll([], GATED) == []
    arrays = [
        array for e in alone[0] for s in e.segments for array in (s.nll_gated_N, s.trace.prob_TL)
    ]
    assert all(array.flags.writeable for array in arrays)  # nothing of Ray's object store
    assert pickle.loads(pickle.dumps(alone[0]))[0].question_id == "q/0"


def test_what_a_worker_refuses_is_said_and_not_tried_again(
    fleet: RolloutFleet, bundle: GateBundle
) -> None:
    long = RolloutTask("set/long", (3,) * 150, (1, 2), (0,))
    sentence = r"fbs-test-rollout-\d(-1)?, chunk 1: ValueError: question set/long needs 181 tokens"
    before = fleet.take_figures()
    with pytest.raises(WorkerError, match=sentence):
        fleet.roll([CHUNKS[0], [long]], GATED)
    other = {name: tensor for name, tensor in bundle.tensors.items() if ".skip_gate." in name}
    with pytest.raises(
        ValueError, match="gate version 9 does not hold the tensors of the version before"
    ):
        fleet.sync(GateBundle.of(9, other))
    assert len(fleet.roll(CHUNKS[:1], GATED)[0]) == 9
    assert before.replacements == fleet.take_figures().replacements == 0


def test_wrong_gates_stop_the_run(fleet: RolloutFleet, bundle: GateBundle) -> None:
    """Last but one of this fleet: its workers do not agree afterwards."""
    name = next(iter(bundle.tensors))
    wrong = {**bundle.tensors, name: bundle.tensors[name][:1].clone()}
    with pytest.raises(WorkerError, match=r"sync: ValueError: .* has shape"):
        fleet.sync(GateBundle.of(3, wrong))
    with pytest.raises(
        WorkerError, match="rollouts under gate version 3 were asked for, but this worker has 2"
    ):
        fleet.roll(CHUNKS[:1], GATED)
    fleet.sync(GateBundle.of(4, bundle.tensors))
    fleet._slots[0].actor.update_gates.remote(GateBundle.of(5, bundle.tensors).pack())
    with pytest.raises(WorkerError, match="older than 5"):
        fleet.sync(GateBundle.of(4, bundle.tensors))
    fleet.sync(GateBundle.of(6, bundle.tensors))
    assert len(fleet.roll(CHUNKS[:1], GATED)[0]) == 9


def test_deadlines_and_limits_name_the_worker(fleet: RolloutFleet) -> None:
    """Last of this fleet: it is left without a worker."""
    fleet._settings = replace(fleet._settings, chunk_deadline_s=0.001)
    with pytest.raises(
        FleetFailure, match=r"fbs-test-rollout-\d(-1)? did not finish its chunk 0 within 0 s"
    ):
        fleet.roll(CHUNKS, GATED)
    limits = {"chunk_deadline_s": 300, "max_replacements": fleet._replacements}
    fleet._settings = replace(fleet._settings, **limits)
    with pytest.raises(
        FleetFailure, match=r"died in its chunk .* after \d replacements of dead workers"
    ):
        kill_during(fleet, CHUNKS * 6, 0, after_s=1.0)


def test_a_fleet_that_cannot_start_says_why(connected: None, tmp_path: Path) -> None:
    with pytest.raises(
        NoRoom, match=r"fbs-big-rollout: no room for 2 workers of .*40.* within 1 s"
    ):
        big = replace(SETTINGS, resources=RankResources(40), room_deadline_s=1)
        RolloutFleet.start("big", str(tmp_path), OPTIONS, big)
    one = replace(SETTINGS, workers=1)
    with pytest.raises(
        WorkerError, match=r"fbs-none-rollout-0, start: ValueError: .* holds no config"
    ):
        RolloutFleet.start("none", str(tmp_path), OPTIONS, one)
    with pytest.raises(
        FleetFailure, match="fbs-late-rollout-0 did not finish its start within 1 s"
    ):
        RolloutFleet.start("late", str(tmp_path), OPTIONS, replace(one, start_deadline_s=1))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"workers": 0}, "workers is 0; it must be above 0"),
        ({"sync_deadline_s": 0}, "sync_deadline_s is 0"),
        ({"max_replacements": -1}, "it cannot be negative"),
        ({"device": "cuda"}, "the device is cuda and each worker takes 0 GPUs"),
        (
            {"resources": RankResources(1, 0.5)},
            r"the device is cpu and each worker takes 0\.5 GPUs",
        ),
        ({"device": "tpu"}, "the device is 'tpu'; rollout workers run on"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FleetSettings(**change)
    assert worker_environment("cpu", 3)["OMP_NUM_THREADS"] == "3"
