"""One rank of the PPO learner. A plain class, so that it runs in a Ray actor (actors/gang.py) or in any process.

Ranks share out the replays; where there are several, a DeepSpeed engine on each adds their gradients up and takes the
steps (actors/engine_weights.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.engine_weights import EngineWeights
from actors.rank_process import meet_ranks, memory_figures, own_address, place_facts, rank_device
from fbs_rl.checkpoint import export_model, load_model
from fbs_rl.config import from_tree
from fbs_rl.gate_bundle import GateBundle
from fbs_rl.rl.learner import PPOLearner
from fbs_rl.rl.learner_settings import LearnerSettings
from fbs_rl.rl.mismatch import Mismatch
from fbs_rl.rl.ranks import Ranks
from fbs_rl.rl.rollout import EpisodeRollout
from fbs_rl.rl.trainable import MasterWeights

_STATE, _RECORD = "learner.pt", "learner.json"


class PPOLearnerWorker:
    """rank of ranks. settings_tree: nested dictionaries of LearnerSettings. seed: as of PPOLearner."""

    def __init__(self, rank: int, ranks: int, settings_tree: dict[str, Any], seed: int) -> None:
        self.ranks, self.seed = Ranks(rank, ranks), seed
        self.settings = from_tree(LearnerSettings, settings_tree)
        runtime = self.settings.runtime
        torch.set_num_threads(runtime.threads)
        self.device = rank_device("runtime.device", runtime.device)

    def address(self) -> tuple[str, int]:
        """(host, free port) at which rank 0 can be met."""
        return own_address()

    def start(
        self,
        folder: str,
        resume: str | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> dict[str, Any]:
        """Meet the other ranks, read the model in `folder`, and go on from what save() wrote to `resume`.

        host, port: of rank 0's address(); one rank needs neither. folder: the Stage-1 model that the run started
        from, on resuming too. Returns what the driver wants to know.
        """
        if self.ranks.count > 1:
            self._meet(host, port)
        runtime = self.settings.runtime
        halves = (
            self.device.type == "cuda"
            if runtime.precision == "auto"
            else runtime.precision == "bf16"
        )
        dtype = torch.bfloat16 if halves else torch.float32
        loaded = load_model(folder, dtype=dtype)
        self.tokenizer, model = loaded.tokenizer, loaded.model
        model.config._attn_implementation = runtime.attention
        moved: Any = model
        moved.to(self.device)
        if runtime.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.train()  # the library checkpoints in training mode alone; nothing else hangs on it here
        weights = EngineWeights if self.ranks.count > 1 else MasterWeights
        self.learner = PPOLearner(model, self.settings, self.seed, self.ranks, weights)
        if resume is not None:
            self.learner.load_state_dict(read_learner(Path(resume), self.device))
        return {
            **place_facts(self.device),
            "trained_parameters": sum(p.numel() for p in self.learner.trained.values()),
            "frozen_digest": self.learner.frozen,
            "optimizer": self.learner.weights.description,
            **self.learner.counters,
        }

    def _meet(self, host: str, port: int | None) -> None:
        if port is None:
            raise ValueError(
                f"{self.ranks.count} ranks need the port that rank 0's address() names"
            )
        runtime = self.settings.runtime
        meet_ranks(
            self.ranks.rank, self.ranks.count, host, port, self.device, runtime.threads, runtime.deadline_s
        )  # fmt: skip

    def self_test(self, episodes: Sequence[EpisodeRollout], step: int = 0) -> Mismatch:
        """As PPOLearner.self_test, with the settings' limits."""
        return self.learner.self_test(episodes, self.settings.self_test, step)

    def update(self, episodes: Sequence[EpisodeRollout], step: int) -> dict[str, Any]:
        """As PPOLearner.update, and what it cost. Every rank must be given the same episodes."""
        began = time.perf_counter()
        metrics = self.learner.update(episodes, step)
        metrics["perf/update_s"] = time.perf_counter() - began
        return metrics | memory_figures(self.device)

    def bundle(self, version: int) -> GateBundle | None:
        """The gates as they are now, from rank 0; None from the others, who hold the same."""
        return self.learner.bundle(version) if self.ranks.rank == 0 else None

    def weights_digest(self) -> str:
        """Digest of what trains, to compare ranks with."""
        return self.learner.bundle(0).digest

    def digest_frozen(self) -> str:
        """Digest of what does not train, as it is now; start() told what it was."""
        return self.learner.digest_frozen()

    def save(self, folder: str) -> dict[str, Any] | None:
        """Write the learner's state to a folder of its own, whole or not at all (rank 0): its digest and counters."""
        if self.ranks.rank != 0:
            return None
        return write_learner(self.learner, Path(folder))

    def export(self, folder: str, tau: float | None = None) -> None:
        """Write a Hugging Face folder of the live model (rank 0), if nothing but what trains has changed.

        tau: the threshold at which it skips when a call does not say; None: such a call skips nothing.
        """
        self.learner.check_frozen()
        self.learner.model.config.gates_origin = "trained"
        if self.ranks.rank == 0:
            export_model(self.learner.model, self.tokenizer, Path(folder), tau)


def write_learner(learner: PPOLearner, folder: Path) -> dict[str, Any]:
    """Write the state of `learner`; `folder` appears, or is replaced, whole. Returns its record."""
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(learner.state_dict(), partial / _STATE)
    with (partial / _STATE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"sha256": digest, "frozen_digest": learner.frozen, **learner.counters}
    (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in (_STATE, _RECORD):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
    return record


def read_learner(folder: Path, device: torch.device) -> dict[str, Any]:
    """What write_learner wrote; ValueError, in one sentence, if it is damaged or not there."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        with (folder / _STATE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no saved learner ({error}); name an earlier one"
        ) from None
    if not isinstance(record, dict) or digest != record.get("sha256"):
        raise ValueError(
            f"{folder} is damaged: {_STATE} does not match its digest; name an earlier one"
        )
    return torch.load(folder / _STATE, map_location=device, weights_only=True)
