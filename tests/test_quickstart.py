"""The quickstart, end to end on a tiny backbone with random weights: real shards, Ray, DeepSpeed and vLLM."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import LoadedModel, load_model
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.calibration import measure_quality
from fbs_rl.quickstart.__main__ import main
from fbs_rl.quickstart.stage1 import read_texts
from fbs_rl.run_folder import RunFolder
from tests.ray_cluster import LocalCluster, submitted
from tests.small_questions import write_questions
from tests.small_tokenizer import saveable_tokenizer

SIZES = [
    "--sequences",
    "4",
    "--length",
    "48",
    "--ratios",
    "0.2,0.4",
    "--steps",
    "3",
    "--updates",
    "2",
]
VARIANTS = ("gates, fitted only", "gates, trained", "fixed layers, trained", "random, trained")
OWN = "gates, after Stage 2"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = saveable_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=288,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run of two minutes."""
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(questions)
    stage2 = (
        f"questions.sources=[{questions}]", "questions.heldout_frac=0.2", "evaluation.questions=4",
        "episodes.max_new_tokens=4", "fleet.kv_cache_gib=0.1", "fleet.threads_per_engine=1",
        "learner.runtime.threads=1", "tracking.wandb=off",
    )  # fmt: skip
    stage1 = ("cluster.threads_per_rank=1", "tracking.wandb=off")
    return [
        *(word for setting in stage1 for word in ("--stage1", setting)),
        *(word for setting in stage2 for word in ("--stage2", setting)),
    ]


@pytest.fixture(scope="module")
def output() -> list[str]:
    """What the run printed, once it is made."""
    return []


@pytest.fixture(scope="module")
def run(
    backbone: str,
    small: list[str],
    output: list[str],
    ray_cluster: LocalCluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A whole run, submitted as a job; `make run` starts the same command without a cluster."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    words = [sys.executable, "-m", "fbs_rl.quickstart", "--model", backbone, "--out", str(folder)]
    code, printed = submitted(ray_cluster, *words, *SIZES, *small)
    assert code == 0, printed[-3000:]
    output.append(printed)
    return folder


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows(run: Path) -> dict[tuple[str, str, float | None], dict]:
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
    own = {(OWN, language, None) for language in ("en", "zh")}
    assert wanted | own < set(table) and len(table) == len(wanted) + 6


def test_it_trains_what_it_says_on_its_own_shards(run: Path) -> None:
    steps = [r for r in records(run / "stage1") if "train/loss" in r]
    assert [r["train/step"] for r in steps] == [1, 2, 3]
    assert all(r["train/applied"] and r["train/phase"] == "1b" for r in steps)
    settings = yaml.safe_load((run / "stage1" / "config.yaml").read_text())
    assert settings["data"] == str(run / "data")
    assert settings["model"]["backbone"] == str(run / "start")
    train = PackedShards.open(run / "data", "train")
    assert train.sequence_tokens == 48 and len(train) > 100
    summary = json.loads((run / "summary.json").read_text())
    tokens = settings["batch"]["step_sequences"] * 48 * 3
    assert summary["trained_tokens"] == tokens == sum(r["train/tokens"] for r in steps)


def moved(before: Path, after: Path) -> set[str]:
    """Names of the parameters that differ."""
    old, new = (
        dict(load_model(str(folder)).model.named_parameters()) for folder in (before, after)
    )
    return {name for name, value in new.items() if not torch.equal(value, old[name])}


def test_stage_1_starts_from_the_gates_that_were_measured_before_it(run: Path) -> None:
    start, trained = load_model(str(run / "start")), load_model(str(run / "stage1" / "final"))
    assert start.model.config.gates_origin == "fitted"
    assert trained.model.config.gates_origin == "trained"
    heldout = read_texts(start, 4, 48).heldout["en"]
    before = measure_quality(start.model, heldout, 16, gates="dense")
    row = rows(run)["dense, before", "en", 0.0]
    assert before.perplexity == pytest.approx(row["eval/perplexity"], rel=1e-5)
    changed = moved(run / "start", run / "stage1" / "final")
    assert any("skip_gate" in name for name in changed)
    assert any("self_attn" in name for name in changed)


def test_the_model_of_stage_1_reproduces_its_row(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    loaded = load_model(str(run / "stage1" / "final"))
    assert loaded.trained and loaded.model.config.gates == "threshold"
    assert loaded.model.config.tau == summary["taus"]["0.2"]
    assert_reproduces(loaded, rows(run)["gates, trained", "en", 0.2])


def test_stage_2_moves_the_gates_alone_and_leaves_the_final_model(run: Path) -> None:
    changed = moved(run / "stage1" / "final", run / "final")
    assert changed and all(".skip_gate." in name for name in changed)
    loaded, summary = load_model(str(run / "final")), json.loads((run / "summary.json").read_text())
    assert loaded.model.config.tau == summary["tau"]
    assert_reproduces(loaded, rows(run)[OWN, "en", None])
    episodes = [r for r in records(run / "stage2") if "reward/total" in r]
    assert [r["train/step"] for r in episodes] == [1, 2]
    assert sum(r["reward/episodes"] for r in episodes) == summary["episodes"]


def assert_reproduces(loaded: LoadedModel, row: dict) -> None:
    """The folder's own mode and threshold give what the table says."""
    quality = measure_quality(loaded.model, read_texts(loaded, 4, 48).heldout["en"], 16)
    assert quality.perplexity == pytest.approx(row["eval/perplexity"], rel=1e-5)
    assert quality.skip_ratio == row["eval/skip_ratio"]


def test_it_says_what_came_of_it(run: Path, output: list[str]) -> None:
    said, summary = output[0], json.loads((run / "summary.json").read_text())
    before, after = (summary["questions"][when]["eval/reward"] for when in ("before", "after"))
    assert f"it went from {before:+.4f} to {after:+.4f}" in " ".join(said.split())
    for part in ("Held-out perplexity", "Held-out questions", "gated by threshold", f"{run}/final"):
        assert part in said
    assert (run / "stage2" / "pictures" / "reward.png").is_file()


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
        (["--stage1", "phases.step=4"], "unknown key phases.step; did you mean phases.steps?"),
        (["--stage1", "cluster.ranks=3"], "3 ranks of 2 sequences"),
        (["--stage1", "model.options.paw_horizon=20"], "can only set losses, not paw_horizon"),
        (["--stage1", "phases.skip_target_start=0"], "must lie between 0 and 0.75"),
        (["--stage2", "episodes.sample=2"], "unknown key episodes.sample; did you mean"),
        (["--updates", "0"], "updates is 0"),
        (["--length", "300"], "is 288 tokens"),
        (["--ratios", "0.2,0.9"], "only 0.75 of the layers of"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], said: str, backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", backbone, "--out", str(tmp_path / "run"), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_questions_are_looked_for_before_anything_is_written(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--stage2", "questions.sources=[/no/such/file]", "--out", str(tmp_path / "run")]
    assert main(["--model", backbone, *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]  # behind the bar of the weights
    assert said == "quickstart: there is no file or folder /no/such/file"
    assert not (tmp_path / "run").exists()


def test_a_run_never_writes_into_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="name an empty or new folder"):
        RunFolder.plan("quickstart", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
