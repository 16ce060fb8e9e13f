"""What PPO trains, in a DeepSpeed engine: where a learner has several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.trainable import MasterWeights


class EngineWeights(MasterWeights):
    """Master weights whose engine adds gradients up over the ranks and takes the steps.

    The engine holds the float32 copies alone: DeepSpeed would round a bf16 model's values, and the value head's, to
    the model's own type. No ZeRO: what trains is a few megabytes, and every rank keeps all of it, so a saved learner
    fits any number of ranks. The ranks must have met (actors/rank_process.py).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], settings: LearnerSettings) -> None:
        import deepspeed

        super().__init__(named, settings)
        self.engine: Any = deepspeed.initialize(
            model=nn.ParameterList(self.masters.values()),  # has no forward pass, and needs none
            optimizer=self.optimizer,
            config={
                # Losses are shares of a step's sum, and how many calls a rank makes differs from rank to rank.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_allreduce_op": "sum",
                "steps_per_print": 2**31 - 1,
            },
            dist_init_required=False,
        )[0]

    @property
    def description(self) -> str:
        return f"{type(self.optimizer).__name__} in a {type(self.engine).__name__} a rank"

    def sum_over_ranks(self) -> None:
        self.engine.allreduce_gradients()

    def apply(self) -> None:
        self.engine.step()
