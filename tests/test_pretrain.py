"""The training command on a real Ray cluster: jobs, lost ranks, lost drivers, what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.pretrain_worker import PretrainWorker
from fbs_rl.checkpoint import load_model
from fbs_rl.pretrain import main
from fbs_rl.training.step_checkpoint import CheckpointStore
from tests.rank_processes import run_ranks
from tests.ray_cluster import (
    LocalCluster,
    finish,
    losses,
    records,
    step_records,
    wait_for_step,
    write_config,
)
from tests.tiny_training import settings

STEPS = 12


@pytest.fixture(scope="module")
def driver(ray_cluster: LocalCluster) -> Iterator[None]:
    """This process may run the command, on the cluster; its connection is given up at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.environment.items():
            patch.setenv(name, value)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(
    driver: None, training_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of two ranks that nothing happens to, W&B offline."""
    folder = tmp_path_factory.mktemp("undisturbed")
    asked = settings(training_root, cluster__ranks=2, tracking__wandb="offline")
    assert main(["--config", write_config(folder, asked), "--out", str(folder / "run")]) == 0
    return folder / "run"


# --- what a run leaves ------------------------------------------------------------------------------------


def test_every_step_is_logged_and_summed_up(undisturbed: Path) -> None:
    found = step_records(undisturbed)
    assert sorted(found) == list(range(1, STEPS + 1))
    for record in found.values():
        assert record["train/applied"] and record["train/finite"]
        assert record["perf/ranks"] == 2 and record["run/restarts"] == 0
        assert all("/" in name for name in record)
    assert [found[s]["train/phase"] for s in (1, 6, 7, 12)] == ["1a", "1a", "1b", "1b"]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["steps_asked"], summary["steps_done"]) == (STEPS, STEPS)
    assert summary["tokens"] == found[STEPS]["train/total_tokens"]
    assert summary["before"]["eval/loss_dense"] > summary["after"]["eval/loss_dense"]
    assert (
        summary["device"] == "cpu" and {"torch", "ray", "deepspeed"} <= summary["versions"].keys()
    )


def wandb_history(run: Path) -> list[dict[str, Any]]:
    """What the offline run under `run` holds, read back with W&B's own tool."""
    [folder] = run.glob("wandb/offline-run-*")
    command = [
        str(Path(sys.executable).with_name("wandb")),
        "leet",
        "inspect",
        "--json",
        str(folder),
    ]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    lines = [json.loads(line) for line in output.stdout.splitlines()]
    return [line["history"]["item"] for line in lines if line["type"] == "history"]


def test_wandb_holds_the_same_figures(undisturbed: Path) -> None:
    history = wandb_history(undisturbed)
    logged = {r["train/step"]: r for r in history if "train/loss" in r}
    assert sorted(logged) == list(range(1, STEPS + 1))
    for step, record in step_records(undisturbed).items():
        mine = {k: v for k, v in logged[step].items() if not k.startswith("_")}
        assert mine == record
    assert [r["train/step"] for r in history if "eval/ppl_dense" in r] == [0, 6, 12]


def test_samples_are_a_table_and_in_the_metrics(undisturbed: Path) -> None:
    rows = {r["train/step"]: r["eval/samples"] for r in records(undisturbed) if "eval/samples" in r}
    assert sorted(rows) == [0, 6, 12]
    tables = [r for r in wandb_history(undisturbed) if "eval/samples._type" in r]
    for step, table in zip(sorted(rows), tables, strict=True):
        assert table["eval/samples._type"] == "table-file" and table["train/step"] == step
        [file] = undisturbed.glob(f"wandb/offline-run-*/files/{table['eval/samples.path']}")
        shown = json.loads(file.read_text())
        assert shown["columns"] == ["step", "prompt", "dense", "gated"]
        assert shown["data"] == [list(row.values()) for row in rows[step]]
        assert all(row["prompt"] for row in rows[step])


def test_the_exported_folder_is_the_model_that_was_trained(
    undisturbed: Path, training_root: Path
) -> None:
    """Against the checkpoint of the last step: same tensors by name, equal logits, the calibrated threshold."""
    final = undisturbed / "final"
    checkpoint = CheckpointStore(undisturbed / "checkpoints").read(STEPS)
    states = torch.load(
        checkpoint.path / "engine" / "mp_rank_00_model_states.pt", weights_only=False
    )
    live = load_model(str(final)).model
    assert live.config.gates_origin == "trained"
    assert live.config.tau == checkpoint.state["figures"]["eval/skip_30/tau"]
    written = load_file(final / "model.safetensors")
    wanted = {name: tensor for name, tensor in states["module"].items() if name != "lm_head.weight"}
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(written[name], tensor), name
    other = load_model(str(final)).model
    other.load_state_dict(states["module"])
    ids = torch.arange(40).view(2, 20)
    for gates in ("dense", "threshold"):
        assert torch.equal(live(ids, gates=gates).logits, other(ids, gates=gates).logits)


def test_generate_runs_on_it(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fbs_rl.generate import main as generate

    arguments = [str(undisturbed / "final"), "--prompt", "The book", "--max-new-tokens", "4"]
    assert generate(arguments) == 0
    assert "skip" in capsys.readouterr().out


# --- a lost rank -------------------------------------------------------------------------------------------


def rank_pids(run: Path) -> list[int]:
    """Process ids of the ranks of the gang that was started last."""
    places = [r["run/places"] for r in records(run) if "run/places" in r][-1]
    return [int(place.rsplit(" ", 1)[1]) for place in places]


def test_a_submitted_job_survives_a_killed_rank(
    ray_cluster: LocalCluster, undisturbed: Path, training_root: Path, tmp_path: Path
) -> None:
    """`ray job submit`, rank 1 killed in the middle: figures of the whole run equal to the bit."""
    run = tmp_path / "run"
    asked = settings(training_root, cluster__ranks=2, tracking__wandb="offline")
    job = ray_cluster.submit(
        "python", "-m", "fbs_rl.pretrain", "--config", write_config(tmp_path, asked), "--out", str(run)
    )  # fmt: skip
    wait_for_step(run, 6, job)
    os.kill(rank_pids(run)[1], signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(job)
    assert code == 0, output
    assert "starting again from step 4" in output
    assert losses(run) == losses(undisturbed)
    found = step_records(run)
    assert found[5]["run/restarts"] == 1 and found[4]["run/restarts"] == 0
    evaluations = [
        {k: v for k, v in r.items() if k.startswith("eval/")}
        for folder in (run, undisturbed)
        for r in records(folder)
        if r["train/step"] == STEPS and "eval/ppl_dense" in r
    ]
    assert evaluations[0] == evaluations[1]
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (run, undisturbed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    restart_s = next(r["run/restart_s"] for r in found.values() if "run/restart_s" in r)
    assert 0 < restart_s < time.monotonic() - killed + 60
    print(f"restart after a killed rank: {restart_s:.1f} s")


# --- a lost driver -------------------------------------------------------------------------------------------


def all_losses(worker: PretrainWorker, join: Any) -> list[float]:
    join()
    return [worker.run_step(step)["train/loss"] for step in range(worker.settings.phases.steps)]


def test_an_interrupted_driver_is_gone_on_with(
    ray_cluster: LocalCluster,
    driver: None,
    training_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM, then SIGKILL, then a checkpoint with a flipped byte: --resume gives the run left alone."""
    run = tmp_path / "run"
    asked = settings(training_root, checkpoint__every_steps=3, checkpoint__keep=3)
    [wanted] = run_ranks(asked, all_losses)
    first = ray_cluster.command("--config", write_config(tmp_path, asked), "--out", str(run))
    wait_for_step(run, 4, first)
    first.send_signal(signal.SIGTERM)
    code, output = finish(first)
    assert code == 130, output
    store = CheckpointStore(run / "checkpoints")
    stopped = max(store.steps())
    assert stopped >= 4 and f"step_{stopped}; go on with --resume" in output
    assert json.loads((run / "summary.json").read_text())["stopped_because"] == "interrupted"
    second = ray_cluster.command("--resume", str(run))
    wait_for_step(run, max(stopped + 1, 7), second)
    second.kill()
    finish(second)
    newest = max(store.steps())
    flip_a_byte(next((store.root / f"step_{newest}" / "engine").glob("*optim_states.pt")))
    (run / "metrics.jsonl").open("a").write('{"train/step": 9, "train/lo')
    assert main(["--resume", str(run)]) == 0
    said = capfd.readouterr().out
    assert f"step_{newest} is damaged" in said and "does not match its digest" in said
    assert losses(run) == wanted


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_steps_that_are_not_finite_stop_the_run(
    driver: None, training_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that throws the weights out of range: the last good checkpoint is named, exit code 1."""
    asked = settings(
        training_root, optimizer__lr_backbone=1e3, optimizer__warmup_frac=1.0, checkpoint__every_steps=1,
        checkpoint__keep=20, evaluation__sample_prompts=0, max_bad_steps=2,
    )  # fmt: skip
    run = tmp_path / "run"
    assert main(["--config", write_config(tmp_path, asked), "--out", str(run)]) == 1
    said = capfd.readouterr()
    found = step_records(run)
    bad = [step for step, record in found.items() if not record["train/finite"]]
    assert len(bad) == 3 and bad[0] > 2 and max(found) == bad[-1]
    assert found[bad[-1]]["train/bad_steps"] == 3 and found[bad[0]]["train/objective"] is None
    assert "3 steps had a loss or gradient that is not finite" in said.err
    assert said.out.count("the step was not applied") == 3
    # The checkpoint just before the first bad step holds the weights that gave it.
    assert max(CheckpointStore(run / "checkpoints").steps()) == bad[0] - 1
    assert f"the last good checkpoint is {run}/checkpoints/step_{bad[0] - 2};" in said.err


def test_no_room_is_said_and_ends_the_run(
    driver: None, training_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = settings(training_root, cluster__cpus_per_rank=64, cluster__room_deadline_s=1)
    assert main(["--config", write_config(tmp_path, asked), "--out", str(tmp_path / "run")]) == 1
    assert "no room for 1 ranks" in capfd.readouterr().err
