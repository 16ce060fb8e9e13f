"""Checkpoints appear whole, are verified, passed over when damaged, and pruned."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fbs_rl.training.step_checkpoint import CheckpointStore


def write(store: CheckpointStore, step: int, ranks: int = 2) -> Path:
    partial = store.begin(step)
    (partial / "engine").mkdir()
    for name in ("engine/a.pt", "engine/b.pt"):
        (partial / name).write_bytes(f"{name} of step {step}".encode())
    digests = {
        n: hashlib.sha256((partial / n).read_bytes()).hexdigest() for n in store.files(partial)
    }
    return store.finish(step, ranks, {"tokens": 10.0 * step}, digests)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [] and store.newest_state() is None
    assert store.newest(pytest.fail) is None
    for step in (4, 12, 8):
        write(store, step, ranks=step)
    assert store.steps() == [4, 8, 12]
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert (newest.step, newest.ranks, newest.state) == (12, 12, {"tokens": 120.0})
    assert store.newest_state() == {"tokens": 120.0}


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest", "renamed"])
def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(damage: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 4)
    newest = write(store, 8)
    file = newest / "engine" / "b.pt"
    if damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"9")
        said = "engine/b.pt does not match its digest"
    elif damage == "missing":
        file.unlink()
        said = "engine/b.pt is missing"
    elif damage == "manifest":
        (newest / "checkpoint.json").write_text('{"step": 8, "ran')
        said = "its checkpoint.json cannot be read"
    else:
        newest.rename(tmp_path / "step_9")
        newest, said = tmp_path / "step_9", "its checkpoint.json is not that of step 9"
    told: list[str] = []
    found = store.newest(told.append)
    assert found is not None and found.step == 4
    [sentence] = told
    assert sentence.startswith(f"{newest} is damaged: ") and said in sentence


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 4)
    partial = store.begin(8)
    (partial / "a.pt").write_bytes(b"half")
    assert store.steps() == [4]
    with pytest.raises(OSError, match=r"no digest of a\.pt; the checkpoint is not kept"):
        store.finish(8, 1, {}, {})
    assert store.steps() == [4]
    assert not list(store.begin(8).iterdir())  # a later attempt starts clean


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 4, ranks=2)
    write(store, 4, ranks=1)
    assert store.read(4).ranks == 1
    store.prune(1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_4"]


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, None, [12]), (2, None, [10, 12]), (1, 4, [4, 8, 12]), (9, None, [2, 4, 6, 8, 10, 12])],
)  # fmt: skip
def test_pruning(keep: int, every: int | None, left: list[int], tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(2, 13, 2):
        write(store, step)
    store.begin(14)
    store.prune(keep, every)
    assert store.steps() == left
    assert len(list(tmp_path.iterdir())) == len(left)
