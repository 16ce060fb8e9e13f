"""The quickstart, end to end on a tiny backbone with random weights: real shards, Ray, DeepSpeed, final folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import load_model
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.calibration import measure_quality
from fbs_rl.quickstart import main, read_texts
from fbs_rl.run_folder import RunFolder
from tests.small_tokenizer import saveable_tokenizer

SIZES = ["--sequences", "4", "--length", "48", "--ratios", "0.2,0.4", "--steps", "3"]
SMALL = ["--set", "cluster.threads_per_rank=1", "--set", "tracking.wandb=off"]
VARIANTS = ("gates, fitted only", "gates, trained", "fixed layers, trained", "random, trained")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = saveable_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["--model", backbone, "--out", str(folder), *SIZES, *SMALL]) == 0
    return folder


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows(run: Path) -> dict[tuple[str, str, float], dict]:
    return {(r["eval/variant"], r["eval/language"], r["eval/asked_ratio"]): r for r in records(run)}


def test_every_variant_is_measured_at_every_ratio(run: Path) -> None:
    table = rows(run)
    for language in ("en", "zh"):
        for dense in ("dense, before", "dense, trained"):
            assert table[dense, language, 0.0]["eval/skip_ratio"] == 0
        for ratio in (0.2, 0.4):
            random = table["random, trained", language, ratio]["eval/skip_ratio"]
            assert random == pytest.approx(ratio, abs=0.06)
            dropped = table["fixed layers, trained", language, ratio]["eval/skip_ratio"]
            assert dropped == pytest.approx(round(ratio * 8) / 8)
    wanted = set(itertools.product(VARIANTS, ("en", "zh"), (0.2, 0.4)))
    assert wanted < set(table) and len(table) == len(wanted) + 4


def test_it_trains_what_it_says_on_its_own_shards(run: Path) -> None:
    steps = [r for r in records(run / "training") if "train/loss" in r]
    assert [r["train/step"] for r in steps] == [1, 2, 3]
    assert all(r["train/applied"] and r["train/phase"] == "1b" for r in steps)
    settings = yaml.safe_load((run / "training" / "config.yaml").read_text())
    assert settings["data"] == str(run / "data")
    assert settings["model"]["backbone"] == str(run / "start")
    train = PackedShards.open(run / "data", "train")
    assert train.sequence_tokens == 48 and len(train) > 100
    summary = json.loads((run / "summary.json").read_text())
    tokens = settings["batch"]["step_sequences"] * 48 * 3
    assert summary["trained_tokens"] == tokens == sum(r["train/tokens"] for r in steps)


def test_training_starts_from_the_gates_that_were_measured_before_it(run: Path) -> None:
    start, final = load_model(str(run / "start")), load_model(str(run / "final"))
    assert start.model.config.gates_origin == "fitted"
    assert final.model.config.gates_origin == "trained"
    heldout = read_texts(start, 4, 48).heldout["en"]
    before = measure_quality(start.model, heldout, 16, gates="dense")
    row = rows(run)["dense, before", "en", 0.0]
    assert before.perplexity == pytest.approx(row["eval/perplexity"], rel=1e-5)
    changed = [
        name
        for (name, old), new in zip(
            start.model.named_parameters(), final.model.parameters(), strict=True
        )
        if not torch.equal(old, new)
    ]
    assert any("skip_gate" in name for name in changed)
    assert any("self_attn" in name for name in changed)


def test_the_saved_model_reproduces_its_row(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    loaded = load_model(str(run / "final"))
    assert loaded.trained and loaded.model.config.gates == "threshold"
    assert loaded.model.config.tau == summary["saved_tau"] == summary["taus"]["0.2"]
    heldout = read_texts(loaded, 4, 48).heldout["en"]
    quality = measure_quality(loaded.model, heldout, 16)  # the folder's own mode and threshold
    row = rows(run)["gates, trained", "en", 0.2]
    assert quality.perplexity == pytest.approx(row["eval/perplexity"], rel=1e-5)
    assert quality.skip_ratio == row["eval/skip_ratio"]


def test_the_run_folder_says_how_it_was_made(run: Path, backbone: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["command"] == "quickstart" and config["model"] == backbone
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"versions", "commit", "host", "taus", "seconds"}
    assert not list(run.glob(".*partial*"))


def test_a_model_with_gates_is_sent_to_the_training_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(run / "final"), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "is an FBS model already" in err and "fbs_rl.pretrain" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "0,2"], "--ratios is 0,2"),
        (["--ratios", "some"], "--ratios is some"),
        (["--sequences", "3"], "3 sequences"),
        (["--model", "/no/such/model"], "no model folder /no/such/model"),
        (["--preset", "fast"], "no preset 'fast'"),
        (["--steps", "0"], "phases.steps is 0"),
        (["--set", "phases.step=4"], "unknown key phases.step; did you mean phases.steps?"),
        (["--set", "cluster.ranks=3"], "3 ranks of 2 sequences"),
        (["--set", "model.options.paw_horizon=20"], "can only set losses, not paw_horizon"),
        (["--length", "200"], "is 128 tokens"),
        (["--ratios", "0.2,0.9"], "only 0.88 of the layers of"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], said: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", backbone, "--out", str(tmp_path / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_never_writes_into_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="name an empty or new folder"):
        RunFolder.plan("quickstart", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
