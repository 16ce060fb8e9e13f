"""bench train and frontier on a tiny model: that they run and what they report, never how long it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fbs_rl.study_start import stage1_settings
from tests.tiny_training import make_backbone, make_shards, settings_tree


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benches")
    make_backbone(folder / "backbone")
    make_shards(folder / "shards")
    tree = settings_tree(folder, phases__steps=4)
    del tree["data"], tree["model"]["backbone"]
    (folder / "shared.yaml").write_text(yaml.safe_dump(tree))
    return folder


def rows_of(root: Path, *words: str) -> list[dict[str, Any]]:
    """In a process of its own: DeepSpeed joins a process group for good."""
    given = ["--data", str(root / "shards"), "--backbone", str(root / "backbone")]
    done = subprocess.run(
        [sys.executable, "-m", *words, *given], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_frontier_measures_every_arm_on_the_same_tokens(root: Path) -> None:
    rows = rows_of(
        root, "fbs_rl.frontier", "--config", str(root / "shared.yaml"), "--arms", "plain,gates-here",
        "--heldout", "4", "--controls",
    )  # fmt: skip
    dense = {row["arm"]: row for row in rows if row["variant"] == "dense"}
    assert set(dense) == {"plain", "gates-here"}
    assert dense["plain"]["tokens"] == dense["gates-here"]["tokens"] > 0
    assert [r for r in rows if r["arm"] == "plain"] == [dense["plain"]]
    found = {(r["variant"], r["asked"]) for r in rows if r["arm"] == "gates-here"}
    # Two of four layers are as many as three free ones allow to be asked for.
    assert {(v, a) for v in ("gates", "random", "static") for a in (0.1, 0.5)} <= found
    for row in rows:
        assert row["ppl"] > 1 and 0 <= row["skip"] <= 0.75
        assert row["skip"] == 0 or row["variant"] != "dense"


@pytest.mark.parametrize(
    ("arm", "option", "value"),
    [
        ("default", "paw_layers", "every:12"),
        ("previews-4", "paw_layers", "every:4"),
        ("paper", "paw_layers", "every:4"),
        ("default", "gate_block", 1),
        ("block-2", "gate_block", 2),
        ("block-4", "gate_block", 4),
        ("default", "gate_ahead", 1),
        ("gates-here", "gate_ahead", 0),
        ("paper", "gate_ahead", 0),
    ],
)
def test_an_arm_has_the_option_that_it_is_about(arm: str, option: str, value: str | int) -> None:
    """Beside what the shared settings say, here the strength of the gates' target."""
    made = stage1_settings("nowhere", "smollm2-135m", arm, "default", []).model.fbs_config()
    assert getattr(made, option) == value and made.loss_gate == 20.0


def test_bench_train_reports_each_variant(root: Path) -> None:
    few = ["--steps", "2", "--warmups", "1", "--step-sequences", "2", "--micro-sequences", "1"]
    small = settings_tree(root)["model"]["options"]
    options = [w for k, v in small.items() for w in ("--set", f"model.options.{k}={v}")]
    rows = rows_of(
        root, "fbs_rl.bench", "train", "--json", "--variants", "plain,fbs 1b", "--device", "cpu",
        "--precision", "fp32", "--threads", "1", *few, *options,
    )  # fmt: skip
    assert [row["variant"] for row in rows] == ["plain", "fbs 1b"]
    assert rows[0]["share"] == 1.0 and all(row["tokens_per_s"] > 0 for row in rows)
    assert all(row["mfu"] is None and row["peak_gb"] is None for row in rows)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fbs_rl.frontier", "--arms", "plane"], "no arm 'plane'; there are plain, default"),
        (["fbs_rl.bench", "train", "--variants", "x"], "no variant 'x'; there are plain"),
        (["fbs_rl.frontier", "--set", "phases.stepz=1"], "did you mean phases.steps"),
    ],
)
def test_mistakes_are_a_sentence(root: Path, words: list[str], sentence: str) -> None:
    given = ["--data", str(root / "shards"), "--backbone", str(root / "backbone")]
    done = subprocess.run(
        [sys.executable, "-m", *words, *given], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
