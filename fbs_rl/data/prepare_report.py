"""What `prepare` prints and notes: the dry run, the summary, summary.json beside the manifest."""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

from fbs_rl.config import to_tree
from fbs_rl.data.manifest import Manifest
from fbs_rl.data.prepare import Prepared, make_pool, peak_memory, run_plan
from fbs_rl.data.prepare_config import PrepareConfig
from fbs_rl.data.prepare_plan import PreparePlan, estimate, make_plan
from fbs_rl.data.progress import console_reporter
from fbs_rl.data.work_folder import WorkFolder
from fbs_rl.run_folder import RunFolder


def run(config: PrepareConfig, options: argparse.Namespace) -> None:
    """Prepare as the options say, and tell what came out. Raises as `prepare` does."""
    started = time.monotonic()
    out = Path(options.out)
    plan = make_plan(config, options.inputs, out)
    finished = WorkFolder(out, plan.identity).check()
    if options.dry_run:
        print_estimate(plan, out, finished)
        return
    made = run_plan(
        plan,
        out,
        lambda: make_pool(options.workers, options.ray, options.ray_address),
        options.keep_work,
        console_reporter(),
    )
    if not made.new:
        print(
            f"{out} is finished already, with the same configuration and input; nothing was done."
        )
        return
    elapsed_s = time.monotonic() - started
    note_run(made, config, options, elapsed_s)
    print_summary(made, elapsed_s)


def quiet_libraries() -> None:
    """No warnings and no progress bars from transformers; one thread a process in compiled libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_estimate(plan: PreparePlan, out: Path, finished: bool) -> None:
    """The dry run."""
    for file in plan.files:
        field = f"  text in {file.text_field!r}" if file.text_field else ""
        print(f"{file.bytes / 1e6:10.1f} MB  {file.name}{field}")
    needed = estimate(plan)
    print(
        f"{len(plan.files)} files, {len(plan.units)} units of work, about {needed.text_bytes / 1e6:,.0f} MB of text\n"
        f"before filters about {needed.tokens:,} tokens, {needed.sequences:,} sequences of "
        f"{plan.config.sequence_tokens}\n"
        f"shards about {needed.shard_bytes / 1e6:,.0f} MB; while at work about "
        f"{(needed.work_bytes + needed.shard_bytes) / 1e6:,.0f} MB, in {out}"
    )
    if finished:
        print(f"{out} is finished already; nothing would be done")


def note_run(
    made: Prepared, config: PrepareConfig, options: argparse.Namespace, elapsed_s: float
) -> None:
    """config.yaml, metrics.jsonl (one line a stage) and summary.json, as every command leaves them."""
    folder = RunFolder(made.out)
    folder.open("data prepare", to_tree(config))
    for stage, seconds in made.usage.seconds.items():
        speed = speeds(made).get(stage)
        record = {"prepare/stage": stage, "prepare/seconds": seconds}
        folder.log(record | ({} if speed is None else {"prepare/mb_per_core_s": speed}))
    folder.summarise(
        {
            "elapsed_s": round(elapsed_s, 1),
            "seconds": made.usage.seconds,
            "cpu_s": made.usage.cpu_s,
            "mb_per_core_s": speeds(made),
            "workers": options.workers,
            "on_ray": options.ray,
            "peak_rss_bytes": peak_memory(made.usage),
            "digest": made.manifest.digest,
            "totals": totals(made.manifest),
        }
    )


def speeds(made: Prepared) -> dict[str, float]:
    """MB of text for each second of a core, by stage."""
    record: Any = made.manifest.record
    volumes = {"clean": record["text_bytes"], "encode": record["kept"]["bytes"]}
    return {
        stage: round(volume / 1e6 / max(1e-3, made.usage.cpu_s[stage]), 3)
        for stage, volume in volumes.items()
    }


def totals(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Sequences, tokens, documents of each split."""
    return {
        split: {
            "sequences": sum(shard.sequences for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
        }
        for split, shards in manifest.splits.items()
    }


def print_summary(made: Prepared, elapsed_s: float) -> None:
    """What was read, removed and made."""
    record: Any = made.manifest.record
    read_mb = record["text_bytes"] / 1e6
    print(f"read     {record['rows']:,} rows, {read_mb:,.1f} MB of text")
    if record["malformed"]["rows"]:
        print(f"skipped  {record['malformed']['rows']:,} rows that cannot be read:")
        for line in record["malformed"]["first"][:10]:
            print(f"         {line}")
    for why, count in record["removed"].items():
        if count["documents"]:
            print(
                f"removed  {count['documents']:,} documents, {count['bytes'] / 1e6:,.1f} MB: {why}"
            )
    for split, total in totals(made.manifest).items():
        print(
            f"{split:<8} {total['sequences']:,} sequences, {total['tokens']:,} tokens, "
            f"{total['documents']:,} documents"
        )
    memory = peak_memory(made.usage)
    each = ", ".join(f"{stage} {speed:.2f}" for stage, speed in speeds(made).items())
    print(
        f"took     {elapsed_s:.1f} s; MB/s a core: {each}; peak memory "
        f"{max(memory.values()) / 1e6:,.0f} MB a process"
    )
    print(f"digest   {made.manifest.digest}")
