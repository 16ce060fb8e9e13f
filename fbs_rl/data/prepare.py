"""Raw text to packed shards: clean, select, encode, pack. Every stage leaves files, and continues from them.

clean   units of input, in parallel: read, normalise, filter, hash, MinHash
select  all documents at once, one process: duplicates out, splits, order
encode  groups of documents, in parallel: tokens, chunk labels
pack    shards, in parallel: rows cut from the joined streams
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbs_rl.data.cleaning import CleanReport, CleanTask, clean_unit
from fbs_rl.data.encoding import (
    EncoderSpec,
    EncodeTask,
    GroupReport,
    PackTask,
    encode_group,
    pack_shard,
    read_shard_entry,
)
from fbs_rl.data.inputs import UNIT_BYTES
from fbs_rl.data.manifest import SPLITS, Manifest
from fbs_rl.data.prepare_config import PrepareConfig
from fbs_rl.data.prepare_plan import PreparePlan, make_plan
from fbs_rl.data.prepare_record import check_malformed, describe, example_rows, nothing_left
from fbs_rl.data.progress import Reporter, Silent
from fbs_rl.data.selection import Selection, select
from fbs_rl.data.shards import PackedShards
from fbs_rl.data.whole_files import whole_file, write_whole
from fbs_rl.data.work_folder import WorkFolder
from fbs_rl.data.worker_pool import Done, InlinePool, LocalPool, Pool, peak_rss_bytes

_GROUPS_A_UNIT = 8
"""Encoding is ten to a hundred times slower than cleaning, so its tasks are smaller."""


@dataclass(slots=True)
class Usage:
    """What the work took. seconds: of each stage, in this run. cpu_s: of the tasks of a stage, those of
    interrupted runs included. worker_rss_bytes: the largest worker's peak."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    worker_rss_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished folder. new: whether this call made it; usage is empty if not."""

    out: Path
    manifest: Manifest
    new: bool
    usage: Usage


def prepare(
    config: PrepareConfig,
    inputs: Sequence[str],
    out: str | Path,
    workers: int | None = None,
    on_ray: bool = False,
    ray_address: str | None = None,
    keep_work: bool = False,
    unit_bytes: int = UNIT_BYTES,
    reporter: Reporter | None = None,
) -> Prepared:
    """Prepare `inputs` into the folder `out`, or continue, or find it done.

    workers: processes of this machine (1, the default: this process does the work itself), or with on_ray
    tasks at a time on the cluster at ray_address (default: one for each of its CPUs). keep_work: leave the
    intermediate results in out/.work.

    Raises ValueError, FileNotFoundError, FileExistsError, BlockingIOError or OSError, in one sentence, for
    what a user can put right; most of it before anything is written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1")
    plan = make_plan(config, inputs, out, unit_bytes)
    return run_plan(
        plan, Path(out), lambda: make_pool(workers, on_ray, ray_address), keep_work, reporter
    )


def make_pool(workers: int | None, on_ray: bool, ray_address: str | None) -> Pool:
    """Where the tasks run."""
    if on_ray:
        from actors.prepare_worker import RayPool

        return RayPool(workers, ray_address)
    return LocalPool(workers) if workers and workers > 1 else InlinePool()


def run_plan(
    plan: PreparePlan,
    out: Path,
    open_pool: Callable[[], Pool],
    keep_work: bool = False,
    reporter: Reporter | None = None,
) -> Prepared:
    """As `prepare`, for a plan that has been made."""
    work = WorkFolder(out, plan.identity)
    if work.check():
        for split in SPLITS:
            PackedShards.open(out, split)  # finished, and still whole as far as sizes tell
        return Prepared(out, Manifest.read(out), False, Usage())
    with work:
        if work.check():  # finished by another process since
            return Prepared(out, Manifest.read(out), False, Usage())
        work.begin(plan.unit_bytes)
        pool = open_pool()
        preparation = _Preparation(plan, work, pool, reporter or Silent())
        try:
            manifest = preparation.run()
        finally:
            pool.close()
            preparation.reporter.close()
        if not keep_work:
            work.remove()
    return Prepared(out, manifest, True, preparation.usage)


class _Preparation:
    """One run over a work folder."""

    def __init__(self, plan: PreparePlan, work: WorkFolder, pool: Pool, reporter: Reporter) -> None:
        self.plan, self.work, self.pool, self.reporter = plan, work, pool, reporter
        self.usage = Usage()
        self.spec = EncoderSpec(
            tokenizer_file=str((work.path / "tokenizer.json").resolve()),
            vocabulary=plan.encoder.vocabulary,
            end_token_id=plan.encoder.end_token_id,
            labels=plan.config.labels,
        )

    def run(self) -> Manifest:
        plan, out = self.plan, self.work.out
        write_whole(self.work.path / "tokenizer.json", plan.encoder.definition)
        reports = self._timed("clean", self._clean)
        selection = self._timed("select", lambda: self._select(reports))
        groups = self._timed("encode", lambda: self._encode(selection))
        splits = self._timed("pack", lambda: self._pack(groups))
        made = Manifest(
            sequence_tokens=plan.config.sequence_tokens,
            vocabulary=plan.encoder.vocabulary,
            tokenizer=plan.config.tokenizer,
            tokenizer_digest=plan.encoder.digest,
            end_token_id=plan.encoder.end_token_id,
            splits=splits,
            record={
                "identity": self.work.stored_identity(),
                **describe(plan, reports, selection, groups),
                "examples": example_rows(out, splits, plan.encoder),
            },
        )
        for left_over in out.glob("*/*.partial"):  # by a run that was killed
            left_over.unlink(missing_ok=True)
        made.write(out)
        return made

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.monotonic()
        made = work()
        self.usage.seconds[stage] = round(time.monotonic() - started, 3)
        return made

    def _run(
        self,
        title: str,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        targets: Sequence[str],
        sizes: Sequence[int],
        finished: Callable[[int], None] = lambda number: None,
        unit: str = "MB",
    ) -> None:
        """Run the tasks that have no report yet; `finished` hears of each, also of those of an earlier run."""
        there = [Path(f"{target}.json").exists() for target in targets]
        done = sum(size for size, is_there in zip(sizes, there, strict=True) if is_there)
        self.reporter.stage(title, sum(sizes), done, unit)
        left = [number for number, is_there in enumerate(there) if not is_there]
        for number in sorted(set(range(len(tasks))) - set(left)):
            finished(number)
        for result in self.pool.run(function, [tasks[number] for number in left]):
            self._note(result)
            self.reporter.advance(sizes[left[result.number]])
            finished(left[result.number])

    def _note(self, result: Done) -> None:
        self.usage.worker_rss_bytes = max(self.usage.worker_rss_bytes, result.peak_rss_bytes)

    def _clean(self) -> list[CleanReport]:
        plan, folder = self.plan, (self.work.path / "clean").resolve()
        benchmarks = None
        if plan.benchmarks is not None:
            benchmarks = str(folder / "benchmarks.npz")
            with whole_file(benchmarks) as file:
                plan.benchmarks.save(file)
        targets = [str(folder / f"{unit.number:05d}") for unit in plan.units]
        tasks = [
            CleanTask(unit, plan.config, target, benchmarks)
            for unit, target in zip(plan.units, targets, strict=True)
        ]
        reports: dict[int, CleanReport] = {}

        def finished(number: int) -> None:
            reports[number] = CleanReport.read(targets[number])
            check_malformed(plan, reports)

        sizes = [unit.input_bytes for unit in plan.units]
        self._run("clean", clean_unit, tasks, targets, sizes, finished)
        self.usage.cpu_s["clean"] = round(sum(report.cpu_s for report in reports.values()), 2)
        return [reports[number] for number in range(len(tasks))]

    def _select(self, reports: Sequence[CleanReport]) -> Selection:
        folder = self.work.path / "selection"
        if (folder / "selection.json").exists():
            return Selection.read(folder)
        self.reporter.stage("select", sum(report.documents for report in reports), 0, "documents")
        targets = [str(self.work.path / "clean" / f"{n:05d}") for n in range(len(reports))]
        group_bytes = max(1, self.plan.unit_bytes // _GROUPS_A_UNIT)
        selection = select(
            targets, reports, self.plan.config, folder, group_bytes, self.reporter.advance
        )
        if not selection.kept[0]:
            raise nothing_left(reports)
        return selection

    def _encode(self, selection: Selection) -> dict[str, list[tuple[str, GroupReport]]]:
        path = self.work.path.resolve()
        tasks, sizes = [], []
        for split in SPLITS:
            for number, (first, last) in enumerate(selection.groups[split]):
                tasks.append(
                    EncodeTask(
                        encoder=self.spec,
                        places=str(path / "selection" / f"{split}.places"),
                        first=first,
                        last=last,
                        clean_folder=str(path / "clean"),
                        target=str(path / "groups" / f"{split}-{number:05d}"),
                    )
                )
            sizes += selection.volumes[split]
        targets = [task.target for task in tasks]
        self._run("encode", encode_group, tasks, targets, sizes)
        groups = {
            split: [(t, GroupReport.read(t)) for t in targets if Path(t).name.startswith(split)]
            for split in SPLITS
        }
        spent = sum(report.cpu_s for split in SPLITS for _, report in groups[split])
        self.usage.cpu_s["encode"] = round(spent, 2)
        return groups

    def _pack(self, groups: dict[str, list[tuple[str, GroupReport]]]) -> dict[str, Any]:
        config, folder = self.plan.config, self.work.path.resolve() / "shards"
        tasks: list[PackTask] = []
        for split in SPLITS:
            starts, total = [], 0
            for target, report in groups[split]:
                starts.append((target, total, total + report.tokens))
                total += report.tokens
            span = config.shard_rows * config.sequence_tokens
            for number, start in enumerate(range(0, total, span)):
                end = min(start + span, total)
                tasks.append(
                    PackTask(
                        encoder=self.spec,
                        folder=str(self.work.out.resolve()),
                        split=split,
                        number=number,
                        start=start,
                        end=end,
                        sequence_tokens=config.sequence_tokens,
                        groups=tuple((t, a) for t, a, b in starts if a < end and b > start),
                        report=str(folder / f"{split}-{number:05d}"),
                    )
                )
        reports = [task.report for task in tasks]
        sizes = [task.end - task.start for task in tasks]
        self._run("pack", pack_shard, tasks, reports, sizes, unit="tokens")
        return {
            split: tuple(read_shard_entry(task.report) for task in tasks if task.split == split)
            for split in SPLITS
        }


def peak_memory(usage: Usage) -> dict[str, int]:
    """Peak resident bytes of this process and of its largest worker."""
    return {"this_process": peak_rss_bytes(), "largest_worker": usage.worker_rss_bytes}
