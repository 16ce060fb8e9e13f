"""Which steps count as bad, when a run has had too many, and which checkpoint is sound then."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbs_rl.training.bad_steps import BadSteps, TooManyBadSteps
from fbs_rl.training.step_checkpoint import CheckpointStore


def store_of(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder)
    for step in steps:
        store.begin(step)
        store.finish(step, 1, {}, {})
    return store


def test_the_limit_holds_for_the_whole_run_not_for_steps_in_a_row() -> None:
    bad = BadSteps(limit=2)
    for step, sound in enumerate((True, False, True, False, True)):
        bad.note(step, sound)
    assert (bad.count, bad.sound_step) == (2, 4)
    with pytest.raises(TooManyBadSteps, match="3 steps had a loss or gradient that is not finite"):
        bad.note(5, False)


def test_a_checkpoint_is_good_once_a_step_from_it_was_finite(tmp_path: Path) -> None:
    """Step 4 (0-based) began with the weights of step_4 and was finite; that of step_5 was not."""
    bad, store = BadSteps(limit=0), store_of(tmp_path, 2, 4, 5)
    assert bad.kept(store) == f"the last good checkpoint is {tmp_path}/step_5"
    bad.note(4, True)
    with pytest.raises(TooManyBadSteps):
        bad.note(5, False)
    assert bad.kept(store) == f"the last good checkpoint is {tmp_path}/step_4"


def test_without_a_good_checkpoint_that_is_said(tmp_path: Path) -> None:
    bad = BadSteps(limit=5)
    assert bad.kept(store_of(tmp_path / "empty")) == "there is no checkpoint yet"
    bad.note(0, False)
    assert bad.kept(store_of(tmp_path, 1)) == "no checkpoint is known to be good"


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    bad = BadSteps(limit=2)
    bad.take_up(2, steps_done=6)
    assert bad.kept(store_of(tmp_path, 5, 6)) == f"the last good checkpoint is {tmp_path}/step_5"
    with pytest.raises(TooManyBadSteps, match="3 steps"):
        bad.note(6, False)
