"""The quickstart, end to end on a tiny backbone with random weights, and the run folder it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fbs_rl.checkpoint import load_model
from fbs_rl.model.calibration import measure_quality
from fbs_rl.quickstart import main, read_texts
from fbs_rl.run_folder import RunFolder
from tests.small_tokenizer import saveable_tokenizer

SIZES = ["--sequences", "4", "--length", "48", "--ratios", "0.2,0.4"]


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
    assert main(["--model", backbone, "--out", str(folder), *SIZES]) == 0
    return folder


def rows(run: Path) -> dict[tuple[str, str, float], dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["eval/variant"], r["eval/language"], r["eval/asked_ratio"]): r for r in records}


def test_every_variant_is_measured_at_every_ratio(run: Path) -> None:
    table = rows(run)
    for language in ("en", "zh"):
        assert table["dense", language, 0.0]["eval/skip_ratio"] == 0
        for ratio in (0.2, 0.4):
            assert table["random gates", language, ratio]["eval/skip_ratio"] == pytest.approx(
                ratio, abs=0.06
            )
            dropped = table["fixed layers dropped", language, ratio]["eval/skip_ratio"]
            assert dropped == pytest.approx(round(ratio * 8) / 8)
    assert len(table) == 2 + 3 * 2 * 2


def test_the_saved_model_reproduces_its_row(run: Path, backbone: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    loaded = load_model(str(run / "final"))
    assert loaded.trained and loaded.model.config.gates == "threshold"
    assert loaded.model.config.tau == summary["saved_tau"]
    heldout = read_texts(loaded, 4, 48).heldout["en"]
    quality = measure_quality(loaded.model, heldout, 16)  # the folder's own mode and threshold
    row = rows(run)["fitted gates", "en", 0.4]
    assert quality.perplexity == pytest.approx(row["eval/perplexity"], rel=1e-5)
    assert quality.skip_ratio == row["eval/skip_ratio"]
    by_gates = load_model(backbone, gates=str(run / "gates"))
    again = measure_quality(by_gates.model, heldout, 16)
    assert again.perplexity == pytest.approx(quality.perplexity, rel=1e-6)


def test_the_run_folder_says_how_it_was_made(run: Path, backbone: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["command"] == "quickstart" and config["model"] == backbone
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"versions", "commit", "host", "taus", "seconds"}
    assert not list(run.glob(".*partial*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "0,2"], "--ratios is 0,2"),
        (["--sequences", "3"], "3 sequences"),
        (["--model", "/no/such/model"], "no model folder /no/such/model"),
        (["--preset", "fast"], "no preset 'fast'"),
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
