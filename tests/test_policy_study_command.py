"""python -m fbs_rl.policy_study on a tiny folder: what its rows and tables say, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fbs_rl.model import FBSConfig
from fbs_rl.policy_study import main
from tests.served_tiny import make_folder
from tests.small_questions import write_questions
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny_training import make_backbone, make_shards, settings_tree


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_folder(folder / "model", "qwen3", vocab=300)
    saveable_tokenizer(size=300).save_pretrained(folder / "model")
    write_questions(folder / "questions.jsonl", 60)
    return folder


def words(root: Path, out: Path, *more: str) -> list[str]:
    return [
        "--model", str(root / "model"), "--updates", "2", "--questions", "4", "--samples", "3", "--tokens", "6",
        "--heldout", "12", "--ratios", "0.1,0.2", "--every", "1", "--device", "cpu", "--batch", "2000",
        "--out", str(out), "--set", f"questions.sources=[{root}/questions.jsonl]",
        "--set", "learner.lr_gates=0.01", "--set", "learner.epochs=1", "--set", "fleet.max_model_len=512", *more,
    ]  # fmt: skip


def test_a_study_of_two_updates(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(words(root, out, "--seeds", "0,1")) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    trials = {(row["config"], row["seed"]) for row in rows}
    assert trials == {(c, s) for c in ("ppo_default", "ppo_paper") for s in (0, 1)}
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == 8 and max(row["mismatch/flip_rate"] for row in updates) == 0
    assert max(row["mismatch/logp_max"] for row in updates) < 1e-3
    equal_rows = [row for row in rows if row["kind"] == "equal"]
    arms = {row["arm"] for row in equal_rows}
    assert arms >= {"no-RL", "no-RL drawn", "PPO", "PPO drawn", "random", "static", "no-RL layer rates"}  # fmt: skip
    assert all(row["skip"] == pytest.approx(row["asked"]) for row in equal_rows)
    assert len(equal_rows) == 4 * 2 * len(arms)  # nothing is missing at any ratio
    # Every trial begins with the same gates on the same questions, whatever the one before did to them.
    for config in ("ppo_default", "ppo_paper"):
        starts = [
            [row["dnll_gold"] for row in equal_rows if (row["config"], row["seed"], row["arm"]) == (config, s, "no-RL")]
            for s in (0, 1)
        ]  # fmt: skip
        assert starts[0] == starts[1] and len(starts[0]) == 2
    moved = [row["minus_no_rl"]["dnll_gold"][0] for row in equal_rows if row["arm"] == "PPO"]
    assert any(abs(value) > 1e-6 for value in moved)
    assert printed.count("at equal measured skip") == 2 and "| 20% | PPO |" in printed
    assert main(["--table", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_writers_are_compared_on_the_same_questions(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    given = (
        "--configs",
        "ppo_default",
        "--seeds",
        "0",
        "--writers",
        "dense,gated",
        "--temperature",
        "0.9",
    )
    assert main(words(root, out, *given)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    gated = "ppo_default, gated writes at T 0.9"
    assert {row["config"] for row in rows} == {"ppo_default", gated}
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == 4 and max(row["mismatch/flip_rate"] for row in updates) == 0
    assert max(row["mismatch/logp_max"] for row in updates) < 1e-3

    def told(config: str, **wanted: Any) -> list[dict[str, Any]]:
        mine = [row for row in rows if row["config"] == config]
        chosen = [row for row in mine if all(row.get(k) == v for k, v in wanted.items())]
        return [{k: v for k, v in row.items() if k != "config"} for row in chosen]

    # Both begin with the same gates, measured on the same text; what they learn from differs.
    for wanted in ({"kind": "point", "step": 0}, {"kind": "own", "arm": "no-RL"}):
        assert told(gated, **wanted) == told("ppo_default", **wanted) != []
    for wanted in ({"kind": "update"}, {"kind": "own", "arm": "PPO"}):
        assert told(gated, **wanted) != told("ppo_default", **wanted)
    for config in ("ppo_default", gated):
        before, after = told(config, kind="own")
        assert (before["step"], after["step"], before["asked"]) == (0, 2, 0.2)
        difference = after["reverse_kl"] - before["reverse_kl"]
        assert after["minus_no_rl"]["reverse_kl"][0] == pytest.approx(difference)
        assert before["minus_no_rl"] is None and before["questions"] == 6
        assert 0.05 < before["skip"] < 0.4 and before["reverse_kl"] > 0
    printed = capsys.readouterr().out
    assert printed.count("text that the gated model writes") == 2
    assert f"{gated}, held-out questions at equal" in printed


def test_rows_of_a_stopped_trial_say_how_many_updates_there_were(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    given = ("--configs", "ppo_default", "--seeds", "0", "--set", "learner.collapse.kl_max=1e-9")
    assert main(words(root, out, *given)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "stopped"] == [1]
    steps = {row["step"] for row in rows if row["kind"] in ("point", "equal", "own")}
    assert steps == {0, 1}


def test_a_start_is_trained_first_and_taken_again(root: Path, tmp_path: Path) -> None:
    """In processes of their own: DeepSpeed joins a process group for good."""
    make_backbone(tmp_path / "backbone")
    make_shards(tmp_path / "shards")
    tree = settings_tree(tmp_path, phases__steps=2)
    del tree["data"], tree["model"]["backbone"]
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(tree))
    given = words(root, tmp_path / "rows.jsonl", "--seeds", "0", "--configs", "ppo_default")[2:]
    given[given.index("fleet.max_model_len=512")] = "fleet.max_model_len=256"
    given += [
        "--stage1", str(tmp_path / "shards"), "--stage1-config", str(tmp_path / "shared.yaml"), "--stage1-set",
        "phases.observe_frac=0.0", "--backbone", str(tmp_path / "backbone"), "--keep", str(tmp_path / "kept"),
        "--set", "questions.max_prompt_tokens=128",
    ]  # fmt: skip
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "fbs_rl.policy_study", *given], capture_output=True, text=True, timeout=900
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stderr)
    assert "stage 1: 2/2 loss" in said[0] and "which is there already" in said[1]
    assert FBSConfig.from_pretrained(tmp_path / "kept" / "stage1").gates_origin == "trained"
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]
    assert (
        figures[: len(rows) // 2] == figures[len(rows) // 2 :]
    )  # the same start, the same numbers


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--stage1", "data"], "give --model or --stage1, exactly one of them"),
        (["--heldout", "50"], "questions out and 50 are wanted; lower --heldout"),
        (["--seeds", "a"], "--seeds is 'a'; give whole numbers"),
        (["--ratios", "0.2,1.5"], "shares of layers lie between 0 and 1"),
        (["--ratios", "0.99"], "layers may skip, fewer than any of --ratios"),
        (
            ["--set", "episodes.sampled_by=gated"],
            "no effect here; say it with --writers and --temp",
        ),
        (["--writers", "both"], "--writers is 'both'; give dense, gated or dense,gated"),
        (
            ["--writers", "gated", "--temperature", "-1"],
            "temperature -1.0; neither can be negative",
        ),
        (["--set", "learner.rate=1"], "unknown key learner.rate"),
        (["--configs", "ppo_other"], "no such settings file"),
        (["--batch", "0"], "batch_tokens is 0"),
        (["--every", "0"], "--every is 0"),
    ],
)
def test_mistakes_are_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert main(words(root, tmp_path / "rows.jsonl", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and said[-1].startswith("policy_study: ")
    assert not (tmp_path / "rows.jsonl").exists()


def test_nothing_of_a_cluster_is_imported() -> None:
    code = (
        "import sys\n"
        "for name in ('ray', 'vllm', 'gymnasium', 'wandb', 'deepspeed', 'pkuseg', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import fbs_rl.policy_study"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
