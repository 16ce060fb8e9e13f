"""What a run starts from, and what is refused before any weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from fbs_rl.checkpoint import load_tokenizer
from fbs_rl.data.shards import write_shards
from fbs_rl.model import FBSConfig, FBSForCausalLM
from fbs_rl.model.backbone import ModelSource
from fbs_rl.training.settings import ModelSettings
from fbs_rl.training.start import check_start, read_start, start_config, starts_plain
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import SMALL
from tests.tiny_training import TOKENS, VOCAB, make_backbone, make_shards, settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_backbone(folder / "backbone")
    make_shards(folder / "shards")
    return folder


def fbs_folder(root: Path, name: str, **options: object) -> str:
    folder = root / name
    if not folder.exists():
        config = FBSConfig(**{**SMALL, **options})
        FBSForCausalLM.from_backbone(str(root / "backbone"), config).save_pretrained(folder)
        load_tokenizer(ModelSource.parse(str(root / "backbone")), VOCAB).save_pretrained(folder)
    return str(folder)


def refused(root: Path, **changes: object) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        check_start(settings(root, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_model_is_the_backbone_with_new_modules(root: Path) -> None:
    chosen = settings(root).model
    model = read_start(chosen).model
    assert model.dtype == torch.float32
    plain = Qwen3ForCausalLM.from_pretrained(root / "backbone")
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids, gates="dense").logits, plain(ids).logits)
    assert model.config.loss_gate == 1.0
    assert start_config(chosen).to_dict()["paw_horizon"] == model.config.paw_horizon


def test_what_fits_is_accepted(root: Path) -> None:
    config, rows = check_start(settings(root))
    assert config.layer_count == 4 and rows.split == "train" and rows.sequence_tokens == TOKENS


def test_an_fbs_folder_keeps_its_options_but_for_losses(root: Path) -> None:
    folder = fbs_folder(root, "fbs", paw_horizon=7)
    options = {"loss_gate": 9.0}
    model = read_start(settings(root, model__backbone=folder, model__options=options).model).model
    assert (model.config.paw_horizon, model.config.loss_gate) == (7, 9.0)
    said = refused(root, model__backbone=folder, model__options={"paw_rank": 8})
    assert "can only set its losses, not paw_rank" in said


def test_a_model_without_gates_has_no_phase_1b(root: Path) -> None:
    folder = fbs_folder(root, "gateless", gate=False)
    changes = {"model__backbone": folder, "model__options": {}}
    assert "set phases.observe_frac to 1" in refused(root, **changes)
    check_start(settings(root, **changes, phases__observe_frac=1.0))


def test_the_target_cannot_be_more_than_may_skip(root: Path) -> None:
    options = {**SMALL, "never_skip": [0, 1, 2]}
    said = refused(root, model__options=options)
    assert "phases.skip_target is 0.36, but only 0.25 of the layers may skip" in said
    check_start(settings(root, model__options=options, phases__skip_target=0.2))


def test_data_of_another_tokenizer_is_refused(root: Path) -> None:
    texts = {"train": ["some words " * 40], "heldout": ["other words " * 40]}
    write_shards(root / "other", texts, saveable_tokenizer(size=280), TOKENS)
    assert "made with another tokenizer" in refused(root, data=str(root / "other"))


def test_data_must_be_there_and_fit_the_context(root: Path) -> None:
    assert "nowhere" in refused(root, data=str(root / "nowhere"))
    texts = {"train": ["some words " * 400], "heldout": ["other words " * 400]}
    write_shards(root / "long", texts, saveable_tokenizer(size=VOCAB), 300)
    assert "prepare shorter ones" in refused(root, data=str(root / "long"))
    texts["heldout"] = []
    write_shards(root / "empty", texts, saveable_tokenizer(size=VOCAB), TOKENS)
    assert "has no heldout sequences" in refused(root, data=str(root / "empty"))


def test_only_a_plain_backbone_gets_a_preview_vocabulary_from_the_data(root: Path) -> None:
    """That of an FBS folder was trained with, whether its gates were or not."""
    assert starts_plain(settings(root).model)
    assert not starts_plain(ModelSettings(backbone=fbs_folder(root, "fbs")))
