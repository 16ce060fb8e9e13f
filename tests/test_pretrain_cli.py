"""What a user of the training command can get wrong: one sentence, exit code 2, nothing started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fbs_rl.config import to_tree
from fbs_rl.data.shards import write_shards
from fbs_rl.pretrain import main
from fbs_rl.run_folder import RunFolder
from fbs_rl.tracking import NoTracker, start_tracker
from fbs_rl.training.step_checkpoint import CheckpointStore
from tests.ray_cluster import write_config
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny_training import TOKENS, settings


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is at hand, and this machine has no GPU."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command refuses `arguments` with."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith("pretrain: ")
    return line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data=nowhere", "nowhere"),
        (
            "batch.step_sequences=5",
            "which 1 ranks of 2 sequences do not divide; take a multiple of 2",
        ),
        (
            "batch.step_sequence=4",
            "unknown key batch.step_sequence; did you mean batch.step_sequences?",
        ),
        (
            "cluster.device=cuda",
            "torch finds no CUDA device on this machine; set it to cpu, or submit",
        ),
        ("cluster.zero_stage=4", "cluster.zero_stage is 4; it must be 0, 1, 2 or 3"),
        ("model.backbone=./none", "there is no model folder ./none"),
        ("tracking.wandb=maybe", "tracking.wandb is 'maybe'; it must be auto, offline or off"),
    ],
)
def test_settings_that_cannot_be_met(
    override: str,
    said: str,
    training_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, settings(training_root, batch__micro_sequences=2))
    run = tmp_path / "run"
    assert said in refused(capsys, "--config", config, "--set", override, "--out", str(run))
    assert not run.exists()


def test_data_that_do_not_fit_the_model(
    training_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, settings(training_root))
    texts = {split: ["The book is read. " * 100] * 3 for split in ("train", "heldout")}
    write_shards(tmp_path / "other", texts, saveable_tokenizer(size=280), TOKENS)
    write_shards(tmp_path / "long", texts, saveable_tokenizer(size=300), 300)
    said = refused(capsys, "--config", config, "--data", str(tmp_path / "other"))
    assert "was made with another tokenizer" in said and "prepare it again" in said
    said = refused(capsys, "--config", config, "--data", str(tmp_path / "long"))
    assert "holds sequences of 300 tokens, but the context of" in said and "is 256" in said


def test_files_and_folders(
    training_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, settings(training_root))
    said = refused(capsys, "--config", "papr_stage1", "--data", "x")
    assert "papr_stage1: no such settings file; the shipped ones are" in said
    said = refused(capsys, "--config", config, "--out", str(tmp_path))
    assert f"{tmp_path} exists already; name an empty or new folder with --out" in said
    said = refused(capsys, "--resume", str(tmp_path))
    assert f"{tmp_path} is no run folder: it has no config.yaml" in said
    assert "data" in refused(capsys)
    assert "unrecognized arguments: --steps 3; --help lists" in refused(capsys, "--steps", "3")


def begun_run(folder: Path, root: Path, **changes: Any) -> Path:
    """A run folder as a driver leaves it after a checkpoint at step 4."""
    from fbs_rl.data.shards import PackedShards

    tree = to_tree(settings(root))
    run = RunFolder(folder)
    run.open("pretrain", tree)
    store = CheckpointStore(folder / "checkpoints")
    store.begin(4)
    digest = PackedShards.open(tree["data"], "train").digest
    state = {"settings": tree, "data": digest, "wandb_id": None, **changes}
    store.finish(4, 1, state, {})
    return folder


def test_a_run_is_gone_on_with_as_it_was_begun(
    training_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path / "run", training_root)
    for override in ("model.preset=paper", "phases.steps=20", "cluster.precision=bf16", "seed=1"):
        said = refused(capsys, "--resume", str(run), "--set", override)
        assert f"{override} cannot change in the middle of a run; only cluster, checkpoint" in said
    assert "leave --config, --data and --out away" in refused(
        capsys, "--resume", str(run), "--data", "x"
    )
    assert main(["--resume", str(run), "--set", "cluster.ranks=2", "--dry-run"]) == 0
    assert "= 2 ranks x 2 accumulated x 1 at once" in capsys.readouterr().out
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["optimizer"]["lr_new"] = 5e-4
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    said = refused(capsys, "--resume", str(run))
    assert "optimizer.lr_new was 0.001 when its checkpoints were made and is 0.0005 now" in said


def test_a_run_is_not_gone_on_with_on_other_data(
    training_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(tmp_path / "run", training_root, data="another digest")
    assert "holds other data than" in refused(capsys, "--resume", str(run))


def test_a_dry_run_prints_the_plan_and_starts_nothing(training_root: Path, tmp_path: Path) -> None:
    """In a process of its own: neither Ray, DeepSpeed nor W&B is even imported."""
    asked = settings(training_root, cluster__ranks=2, batch__step_sequences=8)
    run = tmp_path / "run"
    program = (
        "import sys; from fbs_rl.pretrain import main; code = main(sys.argv[1:]);"
        "print(sorted({'ray', 'deepspeed', 'wandb'} & sys.modules.keys())); sys.exit(code)"
    )
    arguments = ["--config", write_config(tmp_path, asked), "--out", str(run), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert "8 sequences = 2 ranks x 4 accumulated x 1 at once = 384 tokens" in done.stdout
    assert "6 steps of 1a, 6 of 1b; 4,608 tokens in all" in done.stdout
    assert not run.exists()


def test_the_papers_run_is_planned_from_its_backbones_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-4B's own numbers in a folder that holds a configuration and a tokenizer, and no weights."""
    qwen = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 2560,
        "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    folder = tmp_path / "qwen"
    tokenizer = saveable_tokenizer(size=300)
    tokenizer.add_tokens([f"<{i}>" for i in range(130_000)])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(qwen))
    texts = {split: ["The book is read. " * 2000] for split in ("train", "heldout")}
    write_shards(tmp_path / "data", texts, tokenizer, 2048)
    arguments = ["--config", "paper_stage1", "--data", str(tmp_path / "data"), "--dry-run"]
    assert main([*arguments, "--set", f"model.backbone={folder}"]) == 0
    plan = capsys.readouterr().out
    assert "1024 sequences = 64 ranks x 4 accumulated x 4 at once = 2,097,152 tokens" in plan
    assert "4800 steps of 1a, 1200 of 1b; 12,582,912,000 tokens in all" in plan


def test_a_hub_id_that_cannot_be_read_is_one_sentence(
    training_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = str(training_root / "shards")
    said = refused(capsys, "--config", "paper_stage1", "--data", data, "--dry-run")
    assert "Qwen/Qwen3-4B: no model could be read there" in said


def test_tracking_is_off_when_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(start_tracker("auto", "p", tmp_path, {}), NoTracker)
    monkeypatch.delenv("WANDB_MODE")
    assert isinstance(start_tracker("off", "p", tmp_path, {}), NoTracker)
