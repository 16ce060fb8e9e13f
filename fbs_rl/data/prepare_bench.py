"""python -m fbs_rl.data bench INPUT...: speed and memory of the stages, and what near-duplicates are found.

Times are CPU seconds of one process with one thread, so that a busy machine changes them little; what is
loaded once a process (tokenizer, word segmenter) is loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fbs_rl.data.inputs import find_inputs, plan_units
from fbs_rl.data.planted_duplicates import Judgement, judge
from fbs_rl.data.prepare_config import PrepareConfig, read_config
from fbs_rl.data.readers import PieceReader
from fbs_rl.data.script_spans import document_language
from fbs_rl.data.text_filters import normalise
from fbs_rl.data.worker_pool import LocalPool

LANGUAGES = ("en", "zh")
_UNIT_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Sample:
    """Documents of one language in a file. kind: "clean" or "encode", the stage that it is for."""

    language: str
    kind: str
    path: str
    megabytes: float
    config: PrepareConfig


@dataclass(frozen=True, slots=True)
class Speed:
    """MB of UTF-8 text a second of one core. peak_rss_mb: of the process, libraries and models included."""

    language: str
    stage: str
    megabytes: float
    mb_per_core_s: float
    peak_rss_mb: float


def run(options: argparse.Namespace) -> None:
    """Measure and print. Raises ValueError if the inputs hold neither English nor Chinese."""
    config = read_config(
        None,
        [
            f"tokenizer={json.dumps(options.tokenizer)}",
            f"sequence_tokens={options.sequence_tokens}",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        samples, originals = _gather(options, config, Path(folder))
        if not samples:
            raise ValueError(
                "the inputs hold neither English nor Chinese documents to measure with"
            )
        speeds = [speed for sample in samples for speed in _measure(sample)]
    found = [judge(name, texts, config.near_duplicates) for name, texts in originals.items()]
    if options.json:
        judged = [asdict(j) | {"recall": j.recall, "precision": j.precision} for j in found]
        print(json.dumps({"speeds": [asdict(s) for s in speeds], "near_duplicates": judged}))
        return
    console = Console()
    console.print(_speed_table(speeds))
    for judgement in found:
        console.print(_duplicate_table(judgement))
        print(
            f"{judgement.language}: recall {judgement.recall:.4f} ({judgement.found}/{judgement.duplicates}), "
            f"precision {judgement.precision:.4f} ({judgement.right}/{judgement.removed}); outside "
            f"{judgement.margin:.3f} of the threshold: recall {judgement.clear_recall:.4f}, "
            f"precision {judgement.clear_precision:.4f}"
        )


def _gather(
    options: argparse.Namespace, config: PrepareConfig, folder: Path
) -> tuple[list[Sample], dict[str, list[str]]]:
    """Files with as much of each language as is asked for, and documents to plant copies among."""
    wanted = {"clean": options.clean_mb, "encode": options.encode_mb}
    taken = {(name, kind): 0 for name in LANGUAGES for kind in wanted}
    originals: dict[str, list[str]] = {}
    files = {key: (folder / f"{'-'.join(key)}.jsonl").open("w") for key in taken}
    for text in _documents(options.inputs, config):
        language = document_language(text)
        if language not in LANGUAGES:
            continue
        planted = originals.setdefault(language, [])
        if len(planted) < options.planted and len(text) >= 1000:
            planted.append(text)
        for kind, megabytes in wanted.items():
            if taken[language, kind] < megabytes * 1e6:
                taken[language, kind] += len(text.encode())
                files[language, kind].write(json.dumps({"text": text}) + "\n")
        if all(taken[n, k] >= wanted[k] * 1e6 for n, k in taken):
            break
    for file in files.values():
        file.close()
    samples = [
        Sample(name, kind, files[name, kind].name, size / 1e6, config)
        for (name, kind), size in taken.items()
        if size
    ]
    return samples, originals


def _documents(words: Sequence[str], config: PrepareConfig) -> Iterator[str]:
    """Documents of all files in turn, one of each, so that a sample is not one file's."""
    units = plan_units(find_inputs(words, config.rows), _UNIT_BYTES)
    readers = [iter(PieceReader(piece, config.rows)) for unit in units for piece in unit.pieces]
    while readers:
        left = []
        for reader in readers:
            row = next(reader, None)
            if row is not None:
                left.append(reader)
                yield normalise(row.text or "")
        readers = left


def _measure(sample: Sample) -> list[Speed]:
    """In a process of its own, so that its peak memory is its own."""
    pool = LocalPool(1)
    try:
        done = next(iter(pool.run(_timed, [sample])))
    finally:
        pool.close()
    seconds: dict[str, float] = done.returned
    return [
        Speed(
            sample.language, stage, round(sample.megabytes, 1), round(sample.megabytes / spent, 3),
            round(done.peak_rss_bytes / 1e6, 1),
        )
        for stage, spent in seconds.items()
    ]  # fmt: skip


def _timed(sample: Sample) -> dict[str, float]:
    """CPU seconds by stage."""
    with tempfile.TemporaryDirectory() as folder:
        if sample.kind == "clean":
            from fbs_rl.data.cleaning import CleanReport, CleanTask, clean_unit

            target = f"{folder}/00000"
            unit = plan_units(find_inputs([sample.path], sample.config.rows), 2**62)[0]
            clean_unit(CleanTask(unit, sample.config, target, None))
            return {"clean": CleanReport.read(target).cpu_s}
        return _timed_encoding(sample, Path(folder))


def _timed_encoding(sample: Sample, folder: Path) -> dict[str, float]:
    from fbs_rl.data.document_encoder import DocumentEncoder
    from fbs_rl.data.packing import join_streams
    from fbs_rl.data.prepare_plan import read_tokenizer
    from fbs_rl.data.shards import write_shard

    encoder = DocumentEncoder.of(read_tokenizer(sample.config.tokenizer))
    encoder.encode("读书破万卷，下笔如有神。")  # English documents hold some Chinese too
    with Path(sample.path).open() as file:
        rows: list[Any] = [json.loads(line) for line in file]
    seconds, streams = {}, []
    started = time.process_time()
    for row in rows:
        encoder.count_tokens(row["text"])
    seconds["tokenise alone"] = time.process_time() - started
    started = time.process_time()
    streams = [encoder.encode(row["text"]).stream for row in rows]
    seconds["encode (tokenise, label)"] = time.process_time() - started
    started = time.process_time()
    stream = join_streams(streams)
    length = sample.config.sequence_tokens
    write_shard(
        folder, "train", 0, [stream], len(stream), length, encoder.vocabulary, encoder.end_token_id
    )
    seconds["pack"] = time.process_time() - started
    return seconds


def _speed_table(speeds: Sequence[Speed]) -> Table:
    table = Table(title="Speed of one core")
    for name in ("language", "stage", "MB of text", "MB/s a core", "peak RSS, MB"):
        table.add_column(name, justify="left" if name in ("language", "stage") else "right")
    for speed in speeds:
        table.add_row(
            speed.language, speed.stage, f"{speed.megabytes:.1f}", f"{speed.mb_per_core_s:.2f}",
            f"{speed.peak_rss_mb:,.0f}",
        )  # fmt: skip
    return table


def _duplicate_table(judgement: Judgement) -> Table:
    table = Table(title=f"Planted near-duplicates, {judgement.language}")
    for name in ("words edited", "mean exact Jaccard", "removed"):
        table.add_column(name, justify="right")
    for rate in judgement.rates:
        table.add_row(
            f"{rate.edit_rate:.1%}", f"{rate.similarity:.3f}", f"{rate.removed}/{rate.copies}"
        )
    return table
