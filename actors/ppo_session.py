"""What the PPO loop asks of the cluster: episodes of the fleet, updates of the learner, gates from it to the fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.cluster import connect
from actors.fleet import FleetSettings, RolloutFleet
from actors.gang import Gang, RankResources
from actors.ppo_learner import PPOLearnerWorker
from fbs_rl.config import to_tree
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.ppo_options import Request
from fbs_rl.rl.credit import ScoredEpisode, score_episode
from fbs_rl.rl.end_tokens import end_tokens
from fbs_rl.rl.episode_figures import example_rows, heldout_figures, threshold_like
from fbs_rl.rl.gate_policy import GatePolicy
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.rl.rollout import EpisodeRollout, RolloutSettings
from fbs_rl.rl.rollout_plan import Chunk
from fbs_rl.rl.start_folder import is_backbone, make_start
from fbs_rl.rl.update_plan import plan_update
from fbs_rl.serving.engine_options import EngineOptions
from fbs_rl.training.step_checkpoint import CheckpointStore

Say = Callable[[str], None]
_STEP_TOKENS = 2048


@dataclass(slots=True)
class PPOSession:
    """A running fleet and learner. step: updates done. state: what the checkpoint kept of the run."""

    request: Request
    fleet: RolloutFleet
    gang: Gang
    config: FBSConfig
    step: int
    state: dict[str, Any]
    tested: bool = False

    @property
    def settings(self) -> PPOSettings:
        return self.request.settings

    @property
    def tau(self) -> float:
        """The threshold of evaluations during training: the model's own."""
        return self.config.tau

    def roll(self, step: int) -> list[EpisodeRollout]:
        """The episodes of update `step`, whose gates are drawn as its plan says; the first ones are a self-test too."""
        drawn = self._drawn(step)
        episodes = self._rolled(self.request.plan.chunks(step), drawn)
        if not self.tested:
            self._ask("self_test", episodes, step)
            self.tested = True
        return episodes

    def update(self, step: int, episodes: Sequence[EpisodeRollout]) -> dict[str, Any]:
        """Train on them; the figures of rank 0, which are every rank's."""
        return self._ask("update", episodes, step)[0]

    def sync(self, version: int) -> dict[str, float]:
        """The learner's gates to all engines; what that and the rollouts since the last time took."""
        self.fleet.sync(self._ask("bundle", version)[0])
        return self.fleet.take_figures().record()

    def evaluate(self, tau: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures of the held-out questions with thresholds at tau, and a few of the episodes for people."""
        scored = self._heldout(self._rollout(None, (), tau))
        shown = scored[: self.settings.evaluation.example_episodes]
        decode = self.request.tokenizer.decode
        return heldout_figures(scored, self.config), example_rows(
            shown, decode, self.config.layer_count
        )

    def calibrated_tau(self) -> float:
        """The τ that skips on held-out questions as often as the policy of the last update."""
        return threshold_like(self._heldout(self._drawn(self.settings.steps - 1)), self.config)

    def save(self, store: CheckpointStore, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint after `step` updates, and delete those that are no longer kept."""
        partial = store.begin(step)
        self._ask("save", str(partial / "learner"))
        digests = {name: _sha256(partial / name) for name in store.files(partial)}
        store.finish(step, len(self.gang.workers), state, digests)
        keep = self.settings.checkpoint
        store.prune(keep.keep, keep.keep_every_steps)

    def export(self, folder: Path, tau: float | None) -> None:
        """Write a Hugging Face folder of the live model; RuntimeError if anything but the gates has changed."""
        self._ask("export", str(folder), tau)

    def _drawn(self, step: int) -> RolloutSettings:
        plan = plan_update(step, self.settings.learner, self.config)
        return self._rollout(plan.policy, plan.never_skip, self.tau)

    def _rollout(
        self, policy: GatePolicy | None, never_skip: tuple[int, ...], tau: float
    ) -> RolloutSettings:
        ends = end_tokens(self.config, self.request.tokenizer)
        return self.settings.episodes.rollout(policy, ends, tau, never_skip)

    def _heldout(self, rollout: RolloutSettings) -> list[ScoredEpisode]:
        episodes = self._rolled(self.request.plan.heldout(), rollout)
        self.fleet.take_figures()  # those of updates are kept apart
        reward = self.settings.learner.reward
        return [score_episode(episode, self.config, reward) for episode in episodes]

    def _rolled(self, chunks: list[Chunk], rollout: RolloutSettings) -> list[EpisodeRollout]:
        return [episode for chunk in self.fleet.roll(chunks, rollout) for episode in chunk]

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        # Put once, not once for each rank.
        sent = [ray.put(a) if isinstance(a, list) else a for a in arguments]
        return self.gang.call(method, *sent, deadline_s=self.settings.fleet.call_deadline_s)


@contextmanager
def open_session(request: Request, store: CheckpointStore, say: Say) -> Iterator[PPOSession]:
    """A session from the newest whole checkpoint, or from step 0; its actors are killed on leaving.

    Raises GangFailure if they could not be started within the deadlines.
    """
    settings, run = request.settings, request.run.path
    folder = settings.model
    if is_backbone(settings):
        folder = str(make_start(settings, run / "start", say))
    checkpoint = store.newest(say)
    fleet_settings = settings.fleet
    connect(fleet_settings.cpus)
    device = _device(settings)
    gang = _gather(settings, run.name, device)
    try:
        resume = None if checkpoint is None else str(checkpoint.path / "learner")
        host, port = gang.call("address", deadline_s=fleet_settings.start_deadline_s)[0]
        facts = gang.call(
            "start", folder, resume, host, port, deadline_s=fleet_settings.start_deadline_s
        )[0]
        trained = f"{facts['trained_parameters']:,} parameters train"
        ranks = f"{fleet_settings.learners} ranks, " if fleet_settings.learners > 1 else ""
        say(f"learner on {facts['device']}, {ranks}{facts['optimizer']}: {trained}")
        say(f"starting {fleet_settings.engines} engines")
        with RolloutFleet.start(
            run.name, folder, _engine_options(settings, device), _fleet(settings, device), say
        ) as fleet:
            step = 0 if checkpoint is None else checkpoint.step
            state = {} if checkpoint is None else checkpoint.state
            session = PPOSession(request, fleet, gang, FBSConfig.from_pretrained(folder), step, state)  # fmt: skip
            session.sync(step)
            yield session
    finally:
        gang.disband()


def _device(settings: PPOSettings) -> str:
    if settings.fleet.device != "auto":
        return settings.fleet.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"


def _gather(settings: PPOSettings, name: str, device: str) -> Gang:
    resources = RankResources(1, settings.fleet.gpus_per_learner if device == "cuda" else 0)
    tree = to_tree(settings.learner)
    tree["runtime"]["device"] = device
    return Gang.gather(
        f"fbs-{name}-learner", PPOLearnerWorker, settings.fleet.learners, resources, (tree, settings.seed),
        settings.fleet.start_deadline_s, {"OMP_NUM_THREADS": str(settings.learner.runtime.threads)},
    )  # fmt: skip


def _engine_options(settings: PPOSettings, device: str) -> EngineOptions:
    fleet = settings.fleet
    precision = fleet.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    return EngineOptions(
        max_model_tokens=fleet.max_model_len,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
        step_tokens=max(_STEP_TOKENS, fleet.max_model_len),
        kv_cache_gib=fleet.kv_cache_gib,
    )


def _fleet(settings: PPOSettings, device: str) -> FleetSettings:
    fleet = settings.fleet
    gpus = fleet.gpus_per_engine if device == "cuda" else 0
    return FleetSettings(
        workers=fleet.engines,
        resources=RankResources(fleet.cpus_per_engine, gpus),
        device=device,
        threads=fleet.threads_per_engine,
        start_deadline_s=fleet.start_deadline_s,
        chunk_deadline_s=fleet.call_deadline_s,
        max_replacements=fleet.max_replacements,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
