"""What a run starts from: model, tokenizer and data, checked against each other before anything expensive."""

from __future__ import annotations

import torch

from fbs_rl.checkpoint import LoadedModel, load_model, load_tokenizer
from fbs_rl.data.document_encoder import DocumentEncoder
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.backbone import ModelSource, check_family
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.training.settings import ModelSettings, PretrainSettings


def read_start(chosen: ModelSettings) -> LoadedModel:
    """The model in float32. An FBS folder keeps its own options but for those of the losses."""
    own = _own_options(chosen)
    loaded = load_model(
        chosen.backbone,
        fbs=chosen.fbs_config() if own is None else None,
        tokenizer=chosen.tokenizer,
        dtype=torch.float32,
    )
    if own is not None:
        for name, value in chosen.options.items():
            setattr(loaded.model.config, name, value)
    return loaded


def starts_plain(chosen: ModelSettings) -> bool:
    """Whether the run makes its FBS modules anew, rather than going on with those of an FBS folder."""
    return _own_options(chosen) is None


def start_config(chosen: ModelSettings) -> FBSConfig:
    """The configuration the run's model will have; no weights are read."""
    own = _own_options(chosen)
    if own is not None:
        return own
    backbone = ModelSource.parse(chosen.backbone).read_config()
    check_family(backbone, chosen.backbone)
    return chosen.fbs_config().bound_to(backbone)


def _own_options(chosen: ModelSettings) -> FBSConfig | None:
    """The configuration of an FBS folder; None for a plain backbone."""
    config = ModelSource.parse(chosen.backbone).read_config()
    if not isinstance(config, FBSConfig):
        return None
    other = sorted(name for name in chosen.options if not name.startswith("loss_"))
    if other:
        raise ValueError(
            f"{chosen.backbone} is an FBS model with options of its own; model.options can only set "
            f"its losses, not {other[0]}"
        )
    return config


def check_start(settings: PretrainSettings) -> tuple[FBSConfig, PackedShards]:
    """The model's configuration and the training data, if they fit each other and the settings.

    Raises FileNotFoundError or ValueError, in one sentence.
    """
    rows, heldout = (PackedShards.open(settings.data, split) for split in ("train", "heldout"))
    for split, shards in (("train", rows), ("heldout", heldout)):
        if not len(shards):
            raise ValueError(f"{settings.data} has no {split} sequences; prepare more text")
    config = start_config(settings.model)
    _check_gates(settings, config)
    if rows.sequence_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{settings.data} holds sequences of {rows.sequence_tokens} tokens, but the context of "
            f"{settings.model.backbone} is {config.max_position_embeddings}; prepare shorter ones"
        )
    source = ModelSource.parse(settings.model.backbone)
    if settings.model.tokenizer is not None:
        source = ModelSource.parse_tokenizer(settings.model.tokenizer)
    tokenizer = load_tokenizer(source, config.vocab_size)
    if rows.tokenizer_digest != DocumentEncoder.of(tokenizer).digest:
        raise ValueError(
            f"{settings.data} was made with another tokenizer ({rows.tokenizer}) than that of "
            f"{source.name}; prepare it again with --tokenizer {source.name}"
        )
    return config, rows


def _check_gates(settings: PretrainSettings, config: FBSConfig) -> None:
    """Raise ValueError if phase 1b asks for skips that the model's own options, of an FBS folder, rule out."""
    phases = settings.phases
    if phases.observed_steps == phases.steps:
        return
    if not config.gate:
        raise ValueError(
            f"{settings.model.backbone} has no gates, so it has no phase 1b; set phases.observe_frac to 1"
        )
    free = 1 - len(config.protected_layers) / config.layer_count
    if max(phases.skip_target, phases.skip_target_start) > free:
        raise ValueError(
            f"phases.skip_target is {phases.skip_target}, but only {free:.2f} of the layers may skip; "
            f"lower it or protect fewer layers"
        )
