"""The FBS folder that a PPO run starts from: the one that was named, or a backbone given gates in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fbs_rl.checkpoint import load_model
from fbs_rl.data.samples import load_sample
from fbs_rl.data.sequences import cut_sequences
from fbs_rl.model.backbone import ModelSource, check_family
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.gate_fit import centre_gates, fit_in_closed_form
from fbs_rl.rl.learner_settings import Trains
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.update_plan import plan_update

_WINDOWS, _TOKENS = 2, 128
"""Windows of each language of the shipped text that gates are fitted on, and their length."""


def check_start(settings: PPOSettings) -> FBSConfig:
    """The configuration that the run's model will have; no weights are read.

    Raises FileNotFoundError or ValueError, in one sentence, for a model that PPO cannot train.
    """
    config = ModelSource.parse(settings.model).read_config()
    if isinstance(config, FBSConfig):
        if not Path(settings.model).is_dir():
            raise ValueError(f"{settings.model} is an FBS model of a hub; download it and name its folder")  # fmt: skip
    else:
        check_family(config, settings.model)
        config = FBSConfig.preset(settings.preset).bound_to(config)
    if not config.gate:
        raise ValueError(f"{settings.model} has no gates, so there is nothing for PPO to train")
    if settings.learner.trains is not Trains.GATES and not config.paw:
        raise ValueError(
            f"learner.trains is {settings.learner.trains!s}, but {settings.model} has no PAW; set it to gates"
        )
    plan_update(0, settings.learner, config)  # the update in which the fewest layers may skip
    if config.segment_position:
        raise ValueError(f"{settings.model} adds segment positions, which the rollout engines do not know")  # fmt: skip
    if settings.fleet.max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"fleet.max_model_len is {settings.fleet.max_model_len}, but the context of {settings.model} is "
            f"{config.max_position_embeddings}; lower it"
        )
    return config


def is_backbone(settings: PPOSettings) -> bool:
    """Whether gates are made for the model first."""
    return not isinstance(ModelSource.parse(settings.model).read_config(), FBSConfig)


def make_start(settings: PPOSettings, folder: Path, say: Callable[[str], None]) -> Path:
    """An FBS folder of the backbone, with gates and adapters fitted to a little text of the project's own.

    A stand-in for Stage 1: gates that know which layers matter, skipping start_skip of them.
    """
    if (folder / "config.json").is_file():
        return folder  # a resumed run made it
    say(f"{settings.model} has no gates: fitting some in closed form (Stage 1 would train them)")
    options = FBSConfig.preset(settings.preset)
    loaded = load_model(settings.model, fbs=options, dtype=torch.float32)
    model, windows_NT = loaded.model, _windows(loaded.tokenizer)
    counts_V = torch.bincount(windows_NT.flatten(), minlength=model.config.vocab_size)
    if model.model.preview is not None:
        model.model.preview.set_vocabulary(counts_V)
    fit_in_closed_form(model, windows_NT, _TOKENS // 3)
    centre_gates(model, windows_NT, _TOKENS // 3, settings.start_skip)
    model.config.gates_origin, model.config.gates, model.config.tau = "fitted", "threshold", 0.5
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    loaded.tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _windows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    parts = [
        cut_sequences(
            [document.text for document in load_sample(language, "train")], tokenizer, _TOKENS, _WINDOWS
        )
        for language in ("en", "zh")
    ]  # fmt: skip
    return torch.cat(parts)
