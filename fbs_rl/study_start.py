"""The FBS folder that a study begins with: a folder as it is, a backbone given gates, or a short Stage 1 run here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fbs_rl.config import load_settings
from fbs_rl.frontier import ARMS
from fbs_rl.local_stage1 import train_here
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
    worker = train_here(settings, "stage 1", say).worker
    if not worker.model.config.gate:
        raise ValueError("this arm trains no gates, so there is nothing for PPO to go on with")
    folder.parent.mkdir(parents=True, exist_ok=True)
    worker.export(str(folder))
    del worker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder
