"""Stage 1 in this process, one rank: for studies, where a cluster would only be in the way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fbs_rl.config import to_tree
from fbs_rl.training.settings import PretrainSettings


@dataclass(frozen=True, slots=True)
class LocalStage1:
    """worker: a PretrainWorker that holds the trained model. seconds: of its steps alone. tokens: trained on."""

    worker: Any
    seconds: float
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def train_here(settings: PretrainSettings, name: str, say: Callable[[str], None]) -> LocalStage1:
    """All steps. name: what lines of progress, about twenty of them, begin with."""
    from actors.pretrain_worker import PretrainWorker

    worker: Any = PretrainWorker(0, 1, to_tree(settings))
    worker.start(*worker.address(), 0, None)
    steps, seconds, tokens = settings.phases.steps, 0.0, 0.0
    for step in range(steps):
        if step == settings.phases.observed_steps and settings.phases.teacher == "phase_1a":
            worker.teacher = copy.deepcopy(worker.engine.whole_model()).requires_grad_(False).eval()
        record = worker.run_step(step)
        seconds, tokens = seconds + record["perf/step_s"], tokens + record["train/tokens"]
        if (step + 1) % max(steps // 20, 1) == 0:
            say(
                f"{name}: {step + 1}/{steps} loss {record['train/loss']:.4f} "
                f"skip {record.get('gate/skip_ratio', 0.0):.3f} {tokens / seconds:,.0f} tokens/s"
            )
    return LocalStage1(worker, seconds, tokens)
