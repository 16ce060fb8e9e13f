"""The learner as a worker: folders in and out, and two ranks of a real gang against one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.gang import Gang, RankResources
from actors.ppo_learner import PPOLearnerWorker
from fbs_rl.checkpoint import load_model
from fbs_rl.gate_bundle import apply_bundle, gate_tensors
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.mismatch import MismatchError
from fbs_rl.rl.rollout import EpisodeRollout
from tests.gate_rollouts import make_episodes, make_questions
from tests.ray_cluster import LocalCluster
from tests.small_tokenizer import saveable_tokenizer
from tests.tiny import SMALL, enliven

SEED = 7
TREE: dict[str, Any] = {
    "lr_gates": 1e-3,
    "lr_paw": 1e-3,
    "minibatches": 2,
    "epochs": 2,
    "micro_tokens": 40,
    "target_kl": None,
    "self_test": {"tokens": 20, "logp_max": 1e-3, "kl": 1e-6, "flip_frac": 0.0},
    "runtime": {"device": "cpu", "precision": "fp32", "deadline_s": 300},
}
COMPARED = (
    "ppo/loss", "ppo/kl_ref", "ppo/approx_kl", "train/grad_norm", "gate/prob_layer_0", "reward/total", "mismatch/kl",
    "value/loss", "value/explained_var",
)  # fmt: skip
CRITIC = {"credit": "to_go", "baseline": "critic"}
CHECKPOINTED = {
    "trains": "gates+paw",
    "runtime": {**TREE["runtime"], "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def stage1(training_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stage-1 folder of four layers whose modules all act."""
    folder = tmp_path_factory.mktemp("stage1") / "model"
    model = load_model(str(training_root / "backbone"), fbs=FBSConfig(**SMALL)).model
    enliven(model).save_pretrained(folder)
    saveable_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batches(stage1: Path) -> list[list[EpisodeRollout]]:
    """Rollouts of three updates, all under the gates of Stage 1."""
    model = load_model(str(stage1)).model
    asked = make_questions(model, 3, tokens=8)
    return [make_episodes(model, asked, 2, step, protected=0.2) for step in range(3)]


def worker(stage1: Path, resume: Path | None = None, **changes: Any) -> PPOLearnerWorker:
    made = PPOLearnerWorker(0, 1, {**TREE, **changes}, SEED)
    made.start(str(stage1), None if resume is None else str(resume))
    return made


def test_what_comes_out_is_what_was_trained(
    stage1: Path, batches: list[list[EpisodeRollout]], tmp_path: Path
) -> None:
    """A bundle on top of the Stage-1 folder is the exported model; the dense pass is the old one."""
    made = PPOLearnerWorker(0, 1, TREE, SEED)
    facts = made.start(str(stage1))
    assert facts["frozen_digest"] == made.digest_frozen() and facts["updates"] == 0
    assert made.self_test(batches[0]).flip_rate == 0.0
    metrics = made.update(batches[0], 0)
    assert metrics["train/grad_norm"] > 0 and metrics["perf/update_s"] > 0
    made.export(str(tmp_path / "final"), tau=0.4)
    old, new = load_model(str(stage1)).model, load_model(str(tmp_path / "final")).model
    assert (new.config.gates, new.config.tau, new.config.gates_origin) == ("threshold", 0.4, "trained")  # fmt: skip
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(old(ids, gates="dense").logits, new(ids, gates="dense").logits)
        before, wanted = (m(ids, gates="threshold", tau=0.4).gate_prob for m in (old, new))
        bundle = made.bundle(3)
        assert bundle is not None and bundle.version == 3
        apply_bundle(gate_tensors(old, "gates"), bundle)
        old.model.forget_derived()
        assert torch.equal(old(ids, gates="threshold", tau=0.4).gate_prob, wanted)
    assert not torch.equal(before, wanted)
    with pytest.raises(MismatchError):  # rollouts of the gates before
        made.self_test(batches[0])


@pytest.mark.parametrize("changes", [{}, CHECKPOINTED], ids=["gates", "paw"])
def test_a_saved_worker_goes_on_to_the_bit(
    changes: dict[str, Any], stage1: Path, batches: list[list[EpisodeRollout]], tmp_path: Path
) -> None:
    made = worker(stage1, **changes)
    made.update(batches[0], 0)
    record = made.save(str(tmp_path / "learner"))
    assert record is not None and record["updates"] == 1
    wanted = [made.update(batches[step], step)["ppo/loss"] for step in (1, 2)]
    again = worker(stage1, tmp_path / "learner", **changes)
    assert [again.update(batches[step], step)["ppo/loss"] for step in (1, 2)] == wanted
    assert again.weights_digest() == made.weights_digest()
    again.save(str(tmp_path / "learner"))  # replaces the folder, and leaves nothing beside it
    assert [path.name for path in tmp_path.iterdir()] == ["learner"]
    assert json.loads((tmp_path / "learner" / "learner.json").read_text())["updates"] == 3


def test_damaged_folders_are_refused(stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no saved learner"):
        worker(stage1, tmp_path / "nothing")
    made = worker(stage1)
    made.save(str(tmp_path / "learner"))
    file = tmp_path / "learner" / "learner.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged: learner\.pt does not match its digest"):
        worker(stage1, tmp_path / "learner")


def test_a_device_that_is_not_there_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device on this node"):
        PPOLearnerWorker(0, 1, {"runtime": {"device": "cuda"}}, SEED)


# --- two ranks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gang(ray_cluster: LocalCluster) -> Iterator[Gang]:
    ray.init(ray_cluster.environment["RAY_ADDRESS"], log_to_driver=False)
    tree = {**TREE, "advantages": CRITIC}
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    made = Gang.gather(
        "learner", PPOLearnerWorker, 2, RankResources(1), (tree, SEED), 60, environment
    )
    yield made
    made.disband()
    ray.shutdown()


def test_two_ranks_are_one(
    gang: Gang, stage1: Path, batches: list[list[EpisodeRollout]], tmp_path: Path
) -> None:
    """Figures within 1e-5 and weights within float32's sums, with values that every rank needs of the other."""
    host, port = gang.call("address", deadline_s=600)[0]
    facts = gang.call("start", str(stage1), None, host, port, deadline_s=600)
    assert [each["optimizer"] for each in facts] == 2 * ["AdamW in a DeepSpeedEngine a rank"]
    alone = worker(stage1, advantages=CRITIC)
    found = gang.call("self_test", batches[0], deadline_s=600)
    assert found[0] == found[1]
    assert (found[0].decisions, found[0].flip_rate) == (alone.self_test(batches[0]).decisions, 0.0)
    for step in range(2):
        both = gang.call("update", batches[step], step, deadline_s=600)
        wanted = alone.update(batches[step], step)
        for name in COMPARED:
            assert both[0][name] == both[1][name] == pytest.approx(wanted[name], abs=1e-5), name
    digests = gang.call("weights_digest", deadline_s=300)
    assert digests[0] == digests[1]
    theirs, others = gang.call("bundle", 1, deadline_s=300)
    mine = alone.bundle(1)
    assert others is None and mine is not None
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(tensor, mine.tensors[name], atol=1e-5, rtol=0)
    # One rank goes on from what two have saved.
    gang.call("save", str(tmp_path / "learner"), deadline_s=300)
    resumed = worker(stage1, tmp_path / "learner", advantages=CRITIC)
    both = gang.call("update", batches[2], 2, deadline_s=600)
    assert resumed.update(batches[2], 2)["ppo/loss"] == pytest.approx(both[0]["ppo/loss"], abs=1e-5)
