"""Steps that were not applied, since loss or gradient was not finite: how many a run stands, and what is sound then."""

from __future__ import annotations

from dataclasses import dataclass

from fbs_rl.training.step_checkpoint import CheckpointStore


class TooManyBadSteps(RuntimeError):
    """More than a run stands; going on would meet the same."""


@dataclass(slots=True)
class BadSteps:
    """limit: how many a whole run stands. count: of them so far.

    sound_step: the last step (0-based) that was finite, so the weights it began with were sound.
    """

    limit: int
    count: int = 0
    sound_step: int = 0

    def take_up(self, count: int, steps_done: int) -> None:
        """Count on from a checkpoint after `steps_done` steps."""
        self.count, self.sound_step = count, max(steps_done - 1, 0)

    def note(self, step: int, sound: bool) -> None:
        """Count step `step`; raises TooManyBadSteps if that is one bad step too many."""
        if sound:
            self.sound_step = step
            return
        self.count += 1
        if self.count > self.limit:
            raise TooManyBadSteps(f"{self.count} steps had a loss or gradient that is not finite")

    def kept(self, store: CheckpointStore) -> str:
        """Which checkpoint there is to go on from, in a few words."""
        steps, none = store.steps(), "there is no checkpoint yet"
        if self.count:
            # The weights of a checkpoint are known to be sound once they gave a finite loss.
            steps = [step for step in steps if step <= self.sound_step]
            none = "no checkpoint is known to be good"
        return f"the last good checkpoint is {store.root}/step_{steps[-1]}" if steps else none
