"""Stage 2 from the command line: a tiny model, two real engines, a real learner, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from fbs_rl.checkpoint import load_model
from fbs_rl.ppo import main
from fbs_rl.ppo_options import read_request, settings_tree
from fbs_rl.training.step_checkpoint import CheckpointStore
from tests.ray_cluster import LocalCluster, finish, submitted
from tests.served_tiny import make_folder
from tests.small_questions import write_questions
from tests.small_tokenizer import saveable_tokenizer

STEPS = 6
_RUN_S = 1200
_TIMED = ("perf/", "sync/sync_s", "rollout/", "run/")
"""What may differ between two runs of the same numbers."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, forty short questions, and the settings of a run of a minute."""
    folder = tmp_path_factory.mktemp("ppo")
    make_folder(folder / "model", "qwen3", vocab=300)
    saveable_tokenizer(size=300).save_pretrained(folder / "model")
    write_questions(folder / "questions.jsonl")
    settings = {
        "model": str(folder / "model"),
        "questions": {"sources": [str(folder / "questions.jsonl")], "heldout_frac": 0.2},
        "episodes": {"prompts": 4, "samples": 3, "chunk_prompts": 2, "max_new_tokens": 6},
        "learner": {
            "updates": STEPS, "lr_gates": 0.01, "epochs": 2, "minibatches": 2, "target_kl": None,
            "runtime": {"precision": "fp32"},
        },
        "fleet": {"engines": 2, "device": "cpu", "max_model_len": 288, "kv_cache_gib": 0.1},
        "evaluation": {"every_steps": 3, "questions": 4, "example_episodes": 1},
        "checkpoint": {"every_steps": 2},
        "tracking": {"wandb": "offline"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def metrics_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last record of each step, without what time it took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = {row["train/step"]: row for row in rows if "reward/total" in row}
    return {
        step: {k: v for k, v in row.items() if not k.startswith(_TIMED)}
        for step, row in updates.items()
    }


def heldout_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/reward" in row]


@pytest.fixture(scope="module")
def undisturbed(root: Path, ray_cluster: LocalCluster) -> Path:
    """A whole run, submitted as a job."""
    run = root / "undisturbed"
    command = [
        sys.executable,
        "-m",
        "fbs_rl.ppo",
        "--config",
        str(root / "run.yaml"),
        "--out",
        str(run),
    ]
    code, out = submitted(ray_cluster, *command, "--beta", "0.2", "--lam", "0.1", limit_s=_RUN_S)
    assert code == 0, out[-3000:]
    return run


def test_a_submitted_run_leaves_everything_behind(undisturbed: Path, root: Path) -> None:
    steps = metrics_of(undisturbed)
    assert sorted(steps) == list(range(1, STEPS + 1))
    for record in steps.values():
        parts = record["reward/compute_term"] + record["reward/quality_term"]
        assert record["reward/total"] == pytest.approx(parts, abs=1e-9)
        assert 0 < record["gate/skip_rate"] < 1 and record["mismatch/logp_max"] < 1e-3
        assert record["mismatch/flip_rate"] == 0 and record["train/bad_steps"] == 0
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps_done"] == STEPS and summary["stopped_because"] is None
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["learner"]["reward"]["beta"] == 0.2  # fmt: skip
    for name in ("reward.png", "skip_by_layer.png", "gate_probability.png"):
        assert (undisturbed / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    assert (undisturbed / "questions" / "manifest.json").is_file()
    assert list((undisturbed / "wandb").glob("offline-run-*/*.wandb"))


def test_only_gates_have_moved_and_tau_is_the_calibrated_one(undisturbed: Path, root: Path) -> None:
    before = dict(load_model(str(root / "model")).model.named_parameters())
    made = load_model(str(undisturbed / "final")).model
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".skip_gate." in name for name in moved)
    last = heldout_of(undisturbed)[-1]
    assert made.config.gates == "threshold" and made.config.tau == pytest.approx(last["eval/tau"])
    assert made.config.gates_origin == "trained"


def test_killed_engine_and_killed_driver_change_no_number(
    undisturbed: Path, root: Path, ray_cluster: LocalCluster
) -> None:
    """SIGKILL of an engine while it works, then of the driver; --resume gives the run left alone, to the last bit."""
    run = root / "disturbed"
    given = ["--config", str(root / "run.yaml"), "--out", str(run), "--beta", "0.2", "--lam", "0.1"]
    driver = ray_cluster.command(*given, module="fbs_rl.ppo")
    _until(lambda: _steps(run) >= 1, driver)
    os.kill(_engine_pids()[0], signal.SIGKILL)
    _until(lambda: _steps(run) >= 3 and (run / "checkpoints" / "step_2").is_dir(), driver)
    driver.kill()
    driver.communicate()
    resumed = ray_cluster.command("--resume", str(run), module="fbs_rl.ppo")
    out, _ = resumed.communicate(timeout=_RUN_S)
    assert resumed.returncode == 0, out[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("rollout/replacements", 0) for row in rows) == 1
    assert metrics_of(run) == metrics_of(undisturbed)
    assert heldout_of(run)[-1] == heldout_of(undisturbed)[-1]


def test_two_learner_ranks_make_the_same_run(
    undisturbed: Path, root: Path, ray_cluster: LocalCluster
) -> None:
    """Each rank with a DeepSpeed engine; figures of the first updates are those of one rank, within float32's sums."""
    run = root / "two ranks"
    given = ["--config", str(root / "run.yaml"), "--out", str(run), "--beta", "0.2", "--lam", "0.1"]
    words = ("fleet.learners=2", "fleet.engines=1")
    driver = ray_cluster.command(
        *given, *(w for word in words for w in ("--set", word)), module="fbs_rl.ppo"
    )
    _until(lambda: _steps(run) >= 2, driver)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=_RUN_S)
    assert driver.returncode == 130, out[-3000:]
    assert "2 ranks, AdamW in a DeepSpeedEngine a rank" in out
    ours, theirs = metrics_of(run), metrics_of(undisturbed)
    for step in (1, 2):
        for name in ("reward/total", "gate/skip_rate", "ppo/loss", "ppo/kl_ref", "train/grad_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], abs=1e-5, rel=1e-4), (
                step,
                name,
            )
    assert ours[2]["ppo/kl_ref"] > 0  # the gates have moved


def test_steps_that_are_not_finite_stop_the_run(root: Path, ray_cluster: LocalCluster) -> None:
    """A learning rate that throws the gates out of range in the first update; exit code 1, no checkpoint is trusted."""
    run, words = root / "wild", ("lr_gates=1e37", "collapse.kl_max=1e30", "collapse.patience=99")
    given = ["--config", str(root / "run.yaml"), "--out", str(run), "--set", "max_bad_steps=1"]
    given += ["--set", "fleet.engines=1"]
    for word in words:
        given += ["--set", f"learner.{word}"]
    driver = ray_cluster.command(*given, module="fbs_rl.ppo")
    out, _ = driver.communicate(timeout=_RUN_S)
    assert driver.returncode == 1, out[-3000:]
    bad = {step: record["train/bad_steps"] for step, record in metrics_of(run).items()}
    assert bad == {
        1: 3,
        2: 4,
    }  # two epochs of two minibatches; the very first step is what breaks the gates
    assert "step 2: loss or gradient of 4 of 4 optimizer steps is not finite" in out
    assert (
        "ppo: stopped after 0 of 6 steps: 2 steps had a loss or gradient that is not finite" in out
    )
    assert "there is no checkpoint" in out or "no checkpoint is known to be good" in out
    assert json.loads((run / "summary.json").read_text())["bad_steps"] == 2


def test_a_terminated_run_without_a_cluster_ends_after_its_step(root: Path) -> None:
    """Ray's own cluster comes with a SIGTERM handler that exits at once; the run's must be the later one."""
    run = root / "terminated"
    environment = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [
            sys.executable, "-m", "fbs_rl.ppo", "--config", str(root / "run.yaml"), "--out", str(run),
            "--set", "fleet.engines=1",
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    _until(lambda: _steps(run) >= 1, driver)
    driver.send_signal(signal.SIGTERM)
    out, _ = driver.communicate(timeout=_RUN_S)
    assert driver.returncode == 130, out[-3000:]
    stopped = max(CheckpointStore(run / "checkpoints").steps())
    assert stopped == max(metrics_of(run)) < STEPS
    assert (
        f"the last good checkpoint is {run}/checkpoints/step_{stopped}; go on with --resume" in out
    )
    assert json.loads((run / "summary.json").read_text())["stopped_because"] == "interrupted"


def _steps(run: Path) -> int:
    return len(metrics_of(run)) if (run / "metrics.jsonl").is_file() else 0


def _until(done: Any, driver: subprocess.Popen[str]) -> None:
    ends = time.monotonic() + _RUN_S
    while not done():
        assert driver.poll() is None, driver.communicate()[0][-3000:]
        assert time.monotonic() < ends, "too late"
        time.sleep(0.05)


def _engine_pids() -> list[int]:
    """Of Ray actors that run an engine; Ray gives them the name of their class."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "RolloutWorker" in words:
            found.append(process.pid)
    assert found, "no engine is running"
    return found


# --- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "learner.epoch=1"], "did you mean learner.epochs"),
        (["--set", "episodes.sampled_by=gold"], "sampled_by"),
        (["--set", "episodes.prompts=400"], "episodes.prompts is 400, but the pool has"),
        (["--set", "fleet.max_model_len=9999"], "but the context of"),
        (["--set", "questions.max_prompt_tokens=290"], "more than fleet.max_model_len"),
        (
            ["--set", "questions.max_prompt_tokens=282"],
            "are 288 tokens together, which with one more",
        ),
        (["--set", "episodes.samples=1"], "give at least 2, or another baseline"),
        (
            ["--set", "fleet.learners=2", "--set", "fleet.gpus_per_learner=0.5"],
            "two of the 2 ranks could be given one GPU",
        ),
        (["--set", "learner.policy.bound=clip"], "rollout engines draw with mix only"),
        (["--set", "learner.never_skip=[40]"], "never_skip names layer 40"),
        (["--set", "learner.never_skip=[0,1,2,3,4,5,6,7]"], "no layer may skip in update 0"),
        (
            ["--set", "evaluation.example_episodes=-1"],
            "example_episodes is -1; it cannot be negative",
        ),
        (["--set", "max_bad_steps=-1"], "max_bad_steps is -1; it cannot be negative"),
        (["--set", "questions.sources=[nowhere.jsonl]"], "nowhere.jsonl"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--beta", "nan"], "beta"),
        (
            ["--beta", "much"],
            "argument --beta: invalid float value: 'much'; --help lists all options",
        ),
        (["--resume", "/no/such/run"], "no run folder"),
    ],
)
def test_mistakes_are_one_sentence(
    root: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--resume" in words else ["--config", str(root / "run.yaml")]
    assert main([*given, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said and said.startswith("ppo: ") and len(said.splitlines()) == 1


def test_a_run_is_gone_on_with_as_it_was_begun(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", str(root / "run.yaml"), "--out", str(tmp_path / "run")]
    request = read_request(given, "")
    tree = settings_tree(request.settings)
    request.run.open("ppo", tree)
    store = CheckpointStore(request.run.path / "checkpoints")
    store.begin(2)
    store.finish(2, 1, {"settings": tree, "pool": request.plan.pool.digest, "wandb_id": None}, {})

    def refused(*words: str) -> str:
        assert main(["--resume", str(request.run.path), *words]) == 2
        return capsys.readouterr().err

    for override in ("seed=1", "learner.epochs=3", "model=smollm2-135m"):
        said = refused("--set", override)
        assert f"{override} cannot change in the middle of a run; only fleet, checkpoint" in said
    assert "leave --beta away" in refused("--beta", "0.2")
    going_on = ["--resume", str(request.run.path), "--dry-run"]
    assert main([*going_on, "--set", "fleet.engines=3", "--set", "max_bad_steps=9"]) == 0
    assert "3 x 1 threads" in capsys.readouterr().out
    changed = {**tree, "learner": {**tree["learner"], "lr_gates": 0.02}}
    (request.run.path / "config.yaml").write_text(yaml.safe_dump({"command": "ppo", **changed}))
    said = refused()
    assert "learner.lr_gates was 0.01 when its checkpoints were made and is 0.02 now" in said
    (request.run.path / "config.yaml").write_text(yaml.safe_dump({"command": "ppo", **tree}))
    questions = root / "questions.jsonl"
    whole = questions.read_text()
    questions.write_text("".join(whole.splitlines(keepends=True)[1:]))
    try:
        assert "the questions are others than" in refused()
    finally:
        questions.write_text(whole)


def test_the_plan_of_a_step_is_a_function_of_seed_and_step(root: Path) -> None:
    def plan(*words: str) -> Any:
        given = ["--config", str(root / "run.yaml"), "--out", str(root / "never made")]
        return read_request([*given, *words], "").plan

    one, other = plan(), plan("--set", "seed=1")
    assert one.chunks(3) == plan().chunks(3) != one.chunks(2)
    assert one.chunks(3) != other.chunks(3)
    seeds = [s for step in range(5) for chunk in one.chunks(step) for t in chunk for s in t.seeds]
    assert len(set(seeds)) == len(seeds) == 5 * 4 * 3
    assert [len(chunk) for chunk in one.chunks(0)] == [2, 2]


def test_a_dry_run_starts_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "dry"
    assert main(["--config", str(root / "run.yaml"), "--out", str(out), "--dry-run"]) == 0
    assert "4 questions x 3 samples = 12 episodes" in capsys.readouterr().out
    assert not out.exists()


def test_the_benchmark_says_what_an_update_takes(root: Path, ray_cluster: LocalCluster) -> None:
    words = ["ppo", "--config", str(root / "run.yaml"), "--steps", "2", "--json"]
    process = ray_cluster.command(*words, "--set", "fleet.engines=1", module="fbs_rl.bench")
    code, out = finish(process, _RUN_S)
    assert code == 0, out[-3000:]
    result = json.loads(out.strip().splitlines()[-1])
    assert result["settings"]["updates"] == 1 and result["settings"]["episodes"] == 12
    parts = result["parts_s"]
    assert 0 < parts["learning"] < result["update_s"]
    rolled = sum(parts[name] for name in ("dense references", "continuations", "gold answers"))
    assert 0 < rolled <= result["rollout_s"]
    # Six tokens behind each of four prompts, by the dense model, then scored for each of three samples.
    tokens = result["rollout_tokens"]
    assert tokens["generated"] <= 4 * 6 and tokens["scored"] > 3 * tokens["generated"]
    assert result["sync_bytes"] > 0 and result["stock_tokens_per_s"] > 0
