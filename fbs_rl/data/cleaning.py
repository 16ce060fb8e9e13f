"""Stage 1: the rows of one unit of input, normalised, filtered, and reduced to what selection needs.

Written per unit: the texts one after another, one record and one signature for each, band keys, and last of
all the report, which marks the unit as done.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fbs_rl.data.decontamination import BenchmarkIndex
from fbs_rl.data.inputs import Unit
from fbs_rl.data.near_duplicates import band_keys, signatures
from fbs_rl.data.prepare_config import LANGUAGES, PrepareConfig
from fbs_rl.data.readers import Format, Piece, PieceReader, Row, format_of
from fbs_rl.data.shingles import ngram_hashes, unit_hashes
from fbs_rl.data.text_filters import Removal, first_objection, normalise
from fbs_rl.data.whole_files import partial_name, whole_file, write_whole

RECORD = np.dtype(
    [
        ("digest", "<u8", 2),  # of the normalised text
        ("order", "<u8"),  # place among all documents: a hash of digest and seed
        ("split", "<u8"),  # held out if below heldout_frac * 2^64: another such hash
        ("offset", "<u8"),  # in the unit's text file
        ("line", "<u8"),  # from 1 within the piece
        ("bytes", "<u4"),
        ("piece", "<u4"),
        ("source", "<u4"),  # number in the report's list
        ("language", "u1"),  # number in LANGUAGES
        ("listed", "?"),  # takes part in the search for near-duplicates
    ]
)
_BATCH_DOCUMENTS, _BATCH_CHARS = 256, 2**21
_EXAMPLES = 3
_SNIPPET_CHARS = 120
_BAND_DOCUMENTS = 2**14


@dataclass(frozen=True, slots=True)
class CleanTask:
    """One unit and where its files go (without ending). benchmarks: a saved BenchmarkIndex."""

    unit: Unit
    config: PrepareConfig
    target: str
    benchmarks: str | None


@dataclass(slots=True)
class CleanReport:
    """What a unit held. Positions are (piece, line within the piece).

    removed: reason -> [documents, bytes of text]. malformed: [piece, line, problem] of every row that was
    skipped. examples: reason -> [piece, line, first characters, detail]. piece_lines: rows of each piece.
    """

    rows: int = 0
    text_bytes: int = 0
    documents: int = 0
    removed: dict[str, list[int]] = field(default_factory=dict)
    malformed: list[tuple[int, int, str]] = field(default_factory=list)
    examples: dict[str, list[tuple[int, int, str, str]]] = field(default_factory=dict)
    piece_lines: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    cpu_s: float = 0.0

    @classmethod
    def read(cls, target: str) -> CleanReport:
        return cls(**json.loads(Path(f"{target}.json").read_text(encoding="utf-8")))


@dataclass(slots=True)
class _Batch:
    """Documents that passed, not written yet."""

    texts: list[bytes] = field(default_factory=list)
    shingles: list[np.ndarray] = field(default_factory=list)
    records: list[tuple[Any, ...]] = field(default_factory=list)
    chars: int = 0


def clean_unit(task: CleanTask) -> int:
    """Write the files of one unit; returns the bytes of text read.

    Raises ValueError for a damaged file, or when more rows than the limit cannot be read.
    """
    started = time.process_time()
    report = CleanReport()
    with (
        whole_file(f"{task.target}.text") as texts,
        whole_file(f"{task.target}.records") as records,
        whole_file(f"{task.target}.signatures") as sketches,
    ):
        _UnitCleaner(task, report, texts, records, sketches).run()
    _write_bands(task, report.documents)
    report.cpu_s = time.process_time() - started
    write_whole(Path(f"{task.target}.json"), json.dumps(asdict(report), ensure_ascii=False))
    return report.text_bytes


class _UnitCleaner:
    def __init__(
        self,
        task: CleanTask,
        report: CleanReport,
        texts: BinaryIO,
        records: BinaryIO,
        sketches: BinaryIO,
    ) -> None:
        self.task, self.config, self.report = task, task.config, report
        self.texts, self.records, self.sketches = texts, records, sketches
        self.benchmarks = None if task.benchmarks is None else _benchmarks(task.benchmarks)
        self.sources: dict[str, int] = {}
        self.batch, self.offset = _Batch(), 0

    def run(self) -> None:
        for place, piece in enumerate(self.task.unit.pieces):
            reader = PieceReader(piece, self.config.rows)
            for row in reader:
                self._take(row, piece, self.task.unit.first_piece + place)
            self.report.piece_lines.append(reader.lines)
        self._flush()
        self.report.sources = list(self.sources)

    def _take(self, row: Row, piece: Piece, number: int) -> None:
        self.report.rows += 1
        if row.text is None:
            self._skip(row, piece, number)
            return
        text = normalise(row.text)
        encoded = text.encode()
        self.report.text_bytes += len(encoded)
        objection, language = first_objection(text, row.source, self.config.filters)
        units = np.zeros(0, np.uint64)
        detail = row.source if objection is Removal.SOURCE else ""
        near = self.config.near_duplicates
        if objection is None and (near.threshold is not None or self.benchmarks is not None):
            units = unit_hashes(text)
        if objection is None and self.benchmarks is not None:
            detail = self.benchmarks.match(units) or ""
            objection = Removal.CONTAMINATED if detail else None
        if objection is not None:
            self._remove(objection, len(encoded), (number, row.line, text[:_SNIPPET_CHARS], detail))
            return
        size = near.shingle_chars if language == "zh" else near.shingle_words
        self._add(encoded, ngram_hashes(units, size), row, number, language)

    def _add(
        self, encoded: bytes, shingles: np.ndarray, row: Row, piece: int, language: str
    ) -> None:
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        high, low = np.frombuffer(digest, "<u8").tolist()
        source = self.sources.setdefault(row.source, len(self.sources))
        self.batch.records.append(
            (
                (high, low),
                _hash(digest, self.config.seed, b"order"),
                _hash(digest, self.config.seed, b"split"),
                self.offset, row.line, len(encoded), piece, source,
                LANGUAGES.index(language), len(shingles) > 0,
            )
        )  # fmt: skip
        self.batch.texts.append(encoded)
        self.batch.shingles.append(shingles)
        self.batch.chars += len(encoded)
        self.offset += len(encoded)
        self.report.documents += 1
        if len(self.batch.texts) == _BATCH_DOCUMENTS or self.batch.chars >= _BATCH_CHARS:
            self._flush()

    def _flush(self) -> None:
        near = self.config.near_duplicates
        if near.threshold is not None:
            self.sketches.write(signatures(self.batch.shingles, near.permutations).tobytes())
        self.texts.writelines(self.batch.texts)
        self.records.write(np.array(self.batch.records, RECORD).tobytes())
        self.batch = _Batch()

    def _skip(self, row: Row, piece: Piece, number: int) -> None:
        self.report.malformed.append((number, row.line, row.problem))
        if len(self.report.malformed) > self.config.rows.malformed_limit:
            raise too_many_malformed(piece, row.line, row.problem, self.config)

    def _remove(self, why: Removal, size: int, example: tuple[int, int, str, str]) -> None:
        counts = self.report.removed.setdefault(why.value, [0, 0])
        counts[0] += 1
        counts[1] += size
        examples = self.report.examples.setdefault(why.value, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)


def _hash(digest: bytes, seed: int, purpose: bytes) -> int:
    hashed = hashlib.blake2b(digest, digest_size=8, salt=seed.to_bytes(8, "little"), person=purpose)
    return int.from_bytes(hashed.digest(), "little")


@functools.lru_cache(maxsize=1)
def _benchmarks(path: str) -> BenchmarkIndex:
    return BenchmarkIndex.load(Path(path))


def _write_bands(task: CleanTask, documents: int) -> None:
    """Band keys, one band after another, from the signatures on disk: memory does not grow with the unit."""
    near = task.config.near_duplicates
    if near.threshold is None or documents == 0:
        Path(f"{task.target}.bands").write_bytes(b"")
        return
    sketch_DP = np.memmap(f"{task.target}.signatures", np.uint32, "r").reshape(documents, -1)
    bands = len(band_keys(sketch_DP[:0], near.threshold))
    partial = partial_name(f"{task.target}.bands")
    key_SD = np.memmap(partial, np.uint64, "w+", shape=(bands, documents))
    for start in range(0, documents, _BAND_DOCUMENTS):
        part = slice(start, start + _BAND_DOCUMENTS)
        key_SD[:, part] = band_keys(np.asarray(sketch_DP[part]), near.threshold)
    key_SD.flush()
    partial.replace(f"{task.target}.bands")


def too_many_malformed(piece: Piece, line: int, problem: str, config: PrepareConfig) -> ValueError:
    """The error that says so, with the last row that was read."""
    return ValueError(
        f"more than {config.rows.malformed_limit} rows cannot be read, {piece.path}:{rows_before(piece) + line} "
        f"among them ({problem}); correct the file or raise rows.malformed_limit"
    )


def rows_before(piece: Piece) -> int:
    """Rows of the file before the piece. Reads the file up to there: for messages, not for every row."""
    if format_of(piece.path)[0] is not Format.JSONL or piece.start == 0:
        return piece.first_row
    with open(piece.path, "rb") as file:
        before = 0
        while file.tell() < piece.start:
            before += file.read(min(2**20, piece.start - file.tell())).count(b"\n")
        # A line that began before the piece and ends in it belongs to the piece before.
        file.seek(piece.start - 1)
        return before + (file.read(1) != b"\n")
