"""A started gang of PretrainWorkers, from a checkpoint or from the beginning, as the training loop sees it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.engine import TAG, UNIVERSAL
from actors.gang import Gang, NoRoom, RankResources
from actors.pretrain_worker import PretrainWorker
from fbs_rl.config import to_tree
from fbs_rl.training.settings import ClusterSettings, PretrainSettings
from fbs_rl.training.step_checkpoint import CheckpointStore, StepCheckpoint

Say = Callable[[str], None]


@dataclass(slots=True)
class PretrainSession:
    """ranks: how many work. step: optimizer steps done when it started. facts: of rank 0. places: host and pid
    by rank. start_s: how long it took to start.
    """

    gang: Gang
    settings: PretrainSettings
    ranks: int
    step: int
    state: dict[str, Any]
    facts: dict[str, Any]
    places: list[str]
    start_s: float

    @property
    def description(self) -> str:
        """One line about who works, from where."""
        return (
            f"{self.ranks} of {self.settings.cluster.ranks} ranks ready after {self.start_s:.1f} s, from step "
            f"{self.step}, {self.facts['optimizer']}, on {self.facts['device']}: {', '.join(self.places)}"
        )

    @property
    def record(self) -> dict[str, Any]:
        """The same for metrics.jsonl."""
        return {"run/ranks": self.ranks, "run/start_s": self.start_s, "run/places": self.places}

    def run_step(self, step: int) -> dict[str, Any]:
        """Figures of the step; its time is that of the slowest rank."""
        records = self.gang.call("run_step", step, deadline_s=self.settings.cluster.step_deadline_s)
        slowest = max(record["perf/step_s"] for record in records)
        tokens_per_s = records[0]["train/tokens"] / slowest
        peak, record = self.facts["peak_flops"], records[0]
        record |= {
            "perf/step_s": slowest,
            "perf/tokens_per_s": tokens_per_s,
            "perf/ranks": self.ranks,
        }
        record["perf/rss_gb"] = sum(r["perf/rss_gb"] for r in records)
        if peak is not None:
            record["perf/mfu"] = tokens_per_s * self.facts["flops_per_token"] / peak
        return record

    def evaluate(self) -> dict[str, float]:
        return self.gang.call("evaluate", deadline_s=self.settings.cluster.step_deadline_s)[0]

    def sample(self) -> list[dict[str, str]]:
        return self.gang.call("sample", deadline_s=self.settings.cluster.step_deadline_s)[0]

    def save(self, store: CheckpointStore, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint after `step` steps, and delete those that are no longer kept."""
        limit = self.settings.cluster.save_deadline_s
        partial = store.begin(step)
        own = self.gang.call("save", str(partial), deadline_s=limit)[0]
        shares = self.gang.call("digest", str(partial), store.files(partial), deadline_s=limit)
        digests = {name: value for share in shares for name, value in share.items()}
        store.finish(step, self.ranks, state | own, digests)
        store.prune(self.settings.checkpoint.keep, self.settings.checkpoint.keep_every_steps)

    def export(self, folder: Path, tau: float | None) -> None:
        """Write a Hugging Face folder of the live model."""
        self.gang.call("export", str(folder), tau, deadline_s=self.settings.cluster.save_deadline_s)

    def read_teacher(self, folder: Path) -> None:
        self.gang.call(
            "read_teacher", str(folder), deadline_s=self.settings.cluster.start_deadline_s
        )

    @property
    def can_grow(self) -> bool:
        """Whether the cluster has room for more ranks than work now, as when a lost node came back."""
        if self.ranks == self.settings.cluster.ranks:
            return False
        wanted = rank_resources(self.settings.cluster).bundle
        free = ray.available_resources()
        more = min(int(free.get(kind, 0) // amount) for kind, amount in wanted.items() if amount)
        return any(
            count > self.ranks
            for count in rank_choices(self.settings)
            if count <= self.ranks + more
        )


@contextmanager
def open_session(
    settings: PretrainSettings, store: CheckpointStore, name: str, say: Say
) -> Iterator[PretrainSession]:
    """A session from the newest whole checkpoint, or from step 0; its ranks are killed on leaving.

    Raises GangFailure if no gang could be started within the deadlines.
    """
    began = time.monotonic()
    checkpoint = store.newest(say)
    gang = _gather(settings, name, say)
    try:
        ranks = len(gang.workers)
        limit = settings.cluster.start_deadline_s
        host, port = gang.call("address", deadline_s=limit)[0]
        step = 0 if checkpoint is None else checkpoint.step
        resume = None
        if checkpoint is not None:
            resume = _resume_point(checkpoint, gang, settings, store)
        facts = gang.call("start", host, port, step, resume, deadline_s=limit)
        shutil.rmtree(store.root / ".universal", ignore_errors=True)
        state = {} if checkpoint is None else checkpoint.state
        places = [f"{fact['host']} pid {fact['pid']}" for fact in facts]
        yield PretrainSession(
            gang, settings, ranks, step, state, facts[0], places, time.monotonic() - began
        )
    finally:
        gang.disband()


def rank_choices(settings: PretrainSettings) -> list[int]:
    """Numbers of ranks that may work, the wanted one first."""
    cluster, batch = settings.cluster, settings.batch
    least = cluster.ranks if cluster.min_ranks is None else cluster.min_ranks
    return [
        count
        for count in range(cluster.ranks, least - 1, -1)
        if batch.step_sequences % (batch.micro_sequences * count) == 0
    ]


def rank_resources(cluster: ClusterSettings) -> RankResources:
    """What a rank takes: a GPU each where the cluster has them, unless told to use CPUs."""
    gpus = ray.cluster_resources().get("GPU", 0)
    use = cluster.device == "cuda" or (cluster.device == "auto" and gpus >= 1)
    return RankResources(cluster.cpus_per_rank, 1 if use else 0)


def _gather(settings: PretrainSettings, name: str, say: Say) -> Gang:
    """As many ranks as there is room for."""
    cluster = settings.cluster
    resources = rank_resources(cluster)
    environment = {
        "OMP_NUM_THREADS": str(cluster.threads_per_rank),
        "DS_ACCELERATOR": "cuda" if resources.gpus else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    failure: NoRoom | None = None
    for ranks in rank_choices(settings):
        try:
            return Gang.gather(
                name,
                PretrainWorker,
                ranks,
                resources,
                (to_tree(settings),),
                cluster.room_deadline_s,
                environment,
            )
        except NoRoom as error:
            failure = error
            say(str(error))
    assert failure is not None
    raise failure


def _resume_point(
    checkpoint: StepCheckpoint, gang: Gang, settings: PretrainSettings, store: CheckpointStore
) -> dict[str, Any]:
    """Where the ranks shall read; files of another number of ranks are converted first."""
    folder, tag = checkpoint.path, TAG
    if checkpoint.ranks != len(gang.workers) and settings.cluster.zero_stage:
        folder, tag = store.root / ".universal", UNIVERSAL
        shutil.rmtree(folder, ignore_errors=True)
        source, target = checkpoint.path / TAG, folder / tag
        gang.call("convert", str(source), str(target), deadline_s=settings.cluster.save_deadline_s)
    return {"folder": str(folder), "tag": tag, "state": checkpoint.state}
