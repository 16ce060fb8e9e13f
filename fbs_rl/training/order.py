"""The order of training data: a pure function of the seed and of how much was read before."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fbs_rl.seeds import stable_hash


@dataclass(slots=True)
class DataOrder:
    """Epoch after epoch over `count` sequences, each epoch in an order of its own.

    There is no iterator and no state to restore: what step s reads depends on s alone. Epochs join
    without a gap; a step may hold the end of one and the start of the next.
    """

    count: int
    seed: int
    _epoch: int = field(default=-1, init=False, repr=False)
    _permutation: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False, repr=False)  # fmt: skip

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("there are no sequences to train on; prepare more text")

    def indices(self, first: int, number: int) -> np.ndarray:
        """Sequence numbers of the samples first .. first + number − 1 of the run."""
        found = np.empty(number, np.int64)
        done = 0
        while done < number:
            epoch, place = divmod(first + done, self.count)
            part = min(number - done, self.count - place)
            found[done : done + part] = self._of_epoch(epoch)[place : place + part]
            done += part
        return found

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            draw = np.random.Generator(np.random.Philox(stable_hash("order", self.seed, epoch)))
            self._permutation, self._epoch = draw.permutation(self.count), epoch
        return self._permutation
