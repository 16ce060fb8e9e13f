"""Stage 3: groups of documents as token streams; stage 4: streams as shards.

A group is encoded by one task, whatever the split into groups; shards are cut from the streams of all groups
in order, so their bytes depend on the order of documents only.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fbs_rl.data.chunk_labels import ChunkLabeller
from fbs_rl.data.document_encoder import DocumentEncoder
from fbs_rl.data.manifest import ShardEntry
from fbs_rl.data.packing import NO_CLAUSE, TokenStream, join_streams
from fbs_rl.data.prepare_config import LabelConfig
from fbs_rl.data.selection import PLACE
from fbs_rl.data.shards import id_dtype, write_shard
from fbs_rl.data.whole_files import whole_file, write_whole

_BLOCK_TOKENS = 2**20
_COVERAGE_BINS = 10
COVERAGE_UNIT = 2**40


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """How every worker makes the same encoder. tokenizer_file: a tokenizer.json."""

    tokenizer_file: str
    vocabulary: int
    end_token_id: int
    labels: LabelConfig


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Documents [first, last) of a places file. clean_folder: the units' text files. target: without ending."""

    encoder: EncoderSpec
    places: str
    first: int
    last: int
    clean_folder: str
    target: str


@dataclass(slots=True)
class GroupReport:
    """What a group became. coverage_sum: of its Chinese documents, in 1/COVERAGE_UNIT, so that sums do not
    depend on the division into groups. coverage_histogram: Chinese documents by coverage, in tenths."""

    tokens: int
    documents: int
    chunks: int
    idioms: int
    coverage_sum: int
    coverage_histogram: list[int]
    cpu_s: float

    @classmethod
    def read(cls, target: str) -> GroupReport:
        return cls(**json.loads(Path(f"{target}.json").read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class PackTask:
    """Tokens [start, end) of the groups' joined streams, as shard `number` of a split.

    groups: (target, first token) of each group that the range touches. report: file for the ShardEntry.
    """

    encoder: EncoderSpec
    folder: str
    split: str
    number: int
    start: int
    end: int
    sequence_tokens: int
    groups: tuple[tuple[str, int], ...]
    report: str


def encode_group(task: EncodeTask) -> int:
    """Write the token stream of one group; returns the bytes of text encoded."""
    started = time.process_time()
    encoder = _encoder(task.encoder)
    size = (task.last - task.first) * PLACE.itemsize
    with open(task.places, "rb") as file:
        file.seek(task.first * PLACE.itemsize)
        places = np.frombuffer(file.read(size), PLACE)
    report = GroupReport(0, len(places), 0, 0, 0, [0] * _COVERAGE_BINS, 0.0)
    streams = []
    for text in _texts(places, Path(task.clean_folder)):
        made = encoder.encode(text)
        streams.append(made.stream)
        report.chunks += made.chunks
        report.idioms += made.idioms
        if not math.isnan(made.coverage):
            report.coverage_sum += round(made.coverage * COVERAGE_UNIT)
            tenth = min(int(made.coverage * _COVERAGE_BINS), _COVERAGE_BINS - 1)
            report.coverage_histogram[tenth] += 1
    stream = join_streams(streams)
    report.tokens = len(stream)
    _write_stream(task.target, stream, encoder.vocabulary)
    report.cpu_s = time.process_time() - started
    write_whole(Path(f"{task.target}.json"), json.dumps(asdict(report)))
    return int(places["bytes"].sum())


@functools.lru_cache(maxsize=1)
def _encoder(spec: EncoderSpec) -> DocumentEncoder:
    backend = Tokenizer.from_file(spec.tokenizer_file)
    backend.encode_special_tokens = True
    return DocumentEncoder(backend, spec.vocabulary, spec.end_token_id, labeller_of(spec.labels))


def labeller_of(config: LabelConfig) -> ChunkLabeller:
    return ChunkLabeller(
        lexicon=config.lexicon,
        min_chars=config.min_chars,
        max_chars=config.max_chars,
        min_han_frac=config.min_han_frac,
    )


def _texts(places: np.ndarray, folder: Path) -> Iterator[str]:
    """The documents in the order of `places`; the files are read at random."""
    files = {
        int(unit): (folder / f"{unit:05d}.text").open("rb") for unit in np.unique(places["unit"])
    }
    try:
        for place in places:
            file = files[int(place["unit"])]
            file.seek(int(place["offset"]))
            yield file.read(int(place["bytes"])).decode()
    finally:
        for file in files.values():
            file.close()


def _write_stream(target: str, stream: TokenStream, vocabulary: int) -> None:
    """Ids, marks, and clauses unless there are none."""
    chinese = bool((stream.clause_N != NO_CLAUSE).any())
    clauses = stream.clause_N if chinese else stream.clause_N[:0]
    arrays = (stream.id_N.astype(id_dtype(vocabulary)), stream.mark_N, clauses)
    for kind, array in zip(("ids", "marks", "clauses"), arrays, strict=True):
        with whole_file(f"{target}.{kind}.npy") as file:
            np.save(file, array)


def pack_shard(task: PackTask) -> int:
    """Write one shard and its entry; returns its tokens."""
    entry = write_shard(
        folder=Path(task.folder),
        split=task.split,
        number=task.number,
        blocks=_blocks(task),
        tokens=task.end - task.start,
        sequence_tokens=task.sequence_tokens,
        vocabulary=task.encoder.vocabulary,
        end_token_id=task.encoder.end_token_id,
    )
    write_whole(Path(f"{task.report}.json"), json.dumps(asdict(entry)))
    return entry.tokens


def _blocks(task: PackTask) -> Iterator[TokenStream]:
    """The shard's tokens in blocks of whole rows, so that memory does not grow with the shard."""
    step = max(1, _BLOCK_TOKENS // task.sequence_tokens) * task.sequence_tokens
    for start in range(task.start, task.end, step):
        yield _slice(task.groups, start, min(start + step, task.end))


def _slice(groups: Sequence[tuple[str, int]], start: int, end: int) -> TokenStream:
    parts = []
    for target, first in groups:
        ids = np.load(f"{target}.ids.npy", mmap_mode="r")
        low, high = max(start - first, 0), min(end - first, len(ids))
        if low >= high:
            continue
        marks = np.load(f"{target}.marks.npy", mmap_mode="r")[low:high]
        clauses = np.load(f"{target}.clauses.npy", mmap_mode="r")
        clause_N = clauses[low:high] if len(clauses) else np.full(high - low, NO_CLAUSE, np.int32)
        parts.append(TokenStream(ids[low:high].astype(np.uint32), np.array(marks), clause_N))
    return join_streams(parts)


def read_shard_entry(report: str) -> ShardEntry:
    return ShardEntry.of(json.loads(Path(f"{report}.json").read_text(encoding="utf-8")))
