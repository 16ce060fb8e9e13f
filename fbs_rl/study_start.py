"""The FBS folder that a study begins with: a folder as it is, a backbone given gates, or a short Stage 1 run here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fbs_rl.config import load_settings, to_tree
from fbs_rl.frontier import ARMS
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.start_folder import is_backbone, make_start
from fbs_rl.training.settings import PretrainSettings

Say = Callable[[str], None]


def start_folder(settings: PPOSettings, made: Path, say: Say) -> Path:
    """settings.model, or `made` with gates fitted in closed form to it."""
    return make_start(settings, made, say) if is_backbone(settings) else Path(settings.model)


def stage1_settings(
    data: str, backbone: str, arm: str, config: str, given: Sequence[str]
) -> PretrainSettings:
    """What an arm of fbs_rl.frontier trains with. Raises ValueError or OSError, in one sentence."""
    if arm not in ARMS:
        raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}")
    shared = (f"data={data}", f"model.backbone={backbone}")
    return load_settings(PretrainSettings, config, [*shared, *ARMS[arm], *given])


def train_start(settings: PretrainSettings, folder: Path, say: Say) -> Path:
    """Stage 1 in this process, one rank; its model is written to `folder`, unless it is there from an earlier time."""
    if (folder / "config.json").is_file():
        say(f"stage 1: taking {folder}, which is there already")
        return folder
    from actors.pretrain_worker import PretrainWorker

    worker: Any = PretrainWorker(0, 1, to_tree(settings))
    worker.start(*worker.address(), 0, None)
    steps, seconds, tokens = settings.phases.steps, 0.0, 0.0
    for step in range(steps):
        if step == settings.phases.observed_steps and settings.phases.teacher == "phase_1a":
            import copy

            worker.teacher = copy.deepcopy(worker.model).requires_grad_(False).eval()
        record = worker.run_step(step)
        seconds, tokens = seconds + record["perf/step_s"], tokens + record["train/tokens"]
        if (step + 1) % max(steps // 20, 1) == 0:
            say(
                f"stage 1: {step + 1}/{steps} loss {record['train/loss']:.4f} "
                f"skip {record.get('gate/skip_ratio', 0.0):.3f} {tokens / seconds:,.0f} tokens/s"
            )
    if not worker.model.config.gate:
        raise ValueError("this arm trains no gates, so there is nothing for PPO to go on with")
    folder.parent.mkdir(parents=True, exist_ok=True)
    worker.export(str(folder))
    del worker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder
