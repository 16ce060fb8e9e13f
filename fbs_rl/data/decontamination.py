"""Documents that share a run of words with a benchmark.

Every row of a benchmark file is one text: all strings in it, whatever the fields are called. A document is
contaminated if it shares a run of n units (words; characters for Chinese) with one. Rows shorter than n
cannot be looked for; they are counted.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fbs_rl.data.prepare_config import DecontaminationConfig
from fbs_rl.data.readers import Format, format_of, open_binary
from fbs_rl.data.script_spans import document_language
from fbs_rl.data.shingles import ngram_hashes, unit_hashes

_LOW_BITS = np.uint64(2**24 - 1)


@dataclass(frozen=True, slots=True)
class BenchmarkIndex:
    """Hashed n-grams of the benchmarks, by n.

    grams: n -> (sorted uint64, the row each comes from). rows: "file:line". too_short: rows that are not
    looked for.
    """

    grams: dict[int, tuple[np.ndarray, np.ndarray]]
    rows: tuple[str, ...]
    too_short: int
    seen: dict[int, np.ndarray] = field(init=False)  # n -> which low bits occur among the hashes

    def __post_init__(self) -> None:
        seen = {size: np.zeros(_LOW_BITS + 1, bool) for size in self.grams}
        for size, (grams, _) in self.grams.items():
            seen[size][grams & _LOW_BITS] = True
        object.__setattr__(self, "seen", seen)

    @classmethod
    def read(cls, config: DecontaminationConfig) -> BenchmarkIndex:
        """FileNotFoundError or ValueError for a benchmark file that cannot be read."""
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        rows: list[str] = []
        too_short = 0
        for path in benchmark_files(config):
            for line, text in benchmark_rows(path):
                size = ngram_size(document_language(text), config)
                units = unit_hashes(text)
                if len(units) < size:
                    too_short += 1
                    continue
                found.setdefault(size, []).append((ngram_hashes(units, size), len(rows)))
                rows.append(f"{path}:{line}")
        grams = {size: _sorted(parts) for size, parts in found.items()}
        return cls(grams, tuple(rows), too_short)

    def save(self, file: BinaryIO) -> None:
        """Arrays and rows for other processes to `load`."""
        arrays = {
            f"{kind}{size}": array
            for size, pair in self.grams.items()
            for kind, array in zip(("gram", "row"), pair, strict=True)
        }
        arrays["names"] = np.array(self.rows, dtype=np.str_)
        arrays["short"] = np.array(self.too_short)
        np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> BenchmarkIndex:
        with np.load(path) as stored:
            sizes = [int(name.removeprefix("gram")) for name in stored if name.startswith("gram")]
            grams = {size: (stored[f"gram{size}"], stored[f"row{size}"]) for size in sizes}
            return cls(grams, tuple(stored["names"].tolist()), int(stored["short"]))

    def match(self, units: np.ndarray) -> str | None:
        """The benchmark row ("file:line") that a document of these units shares a run with, or None."""
        for size, (grams, rows) in self.grams.items():
            if len(units) < size:
                continue
            hashes = ngram_hashes(units, size)
            # A look into a table spares most hashes the binary search.
            hashes = hashes[self.seen[size][hashes & _LOW_BITS]]
            place = np.minimum(np.searchsorted(grams, hashes), len(grams) - 1)
            hits = np.flatnonzero(grams[place] == hashes)
            if len(hits):
                return self.rows[rows[place[hits[0]]]]
        return None


def benchmark_files(config: DecontaminationConfig) -> list[str]:
    """The files that the configuration names, patterns resolved; FileNotFoundError for one that is not there."""
    found: list[str] = []
    for word in config.files:
        matching = sorted(glob.glob(word, recursive=True)) if glob.has_magic(word) else [word]
        if not matching or not Path(matching[0]).is_file():
            raise FileNotFoundError(f"there is no benchmark file {word}; see decontamination.files")
        found += matching
    return found


def ngram_size(language: str, config: DecontaminationConfig) -> int:
    return config.ngram_chars if language == "zh" else config.ngram_words


def _sorted(parts: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    grams = np.concatenate([hashes for hashes, _ in parts])
    rows = np.repeat(
        np.array([row for _, row in parts], np.uint32), [len(hashes) for hashes, _ in parts]
    )
    unique, first = np.unique(grams, return_index=True)
    return unique, rows[first]


def benchmark_rows(path: str) -> Iterator[tuple[int, str]]:
    """Line and text of each row: the strings of a JSON or Parquet row, or a line of plain text."""
    kind, compression = format_of(path)
    if kind is Format.PARQUET:
        yield from _parquet_rows(path)
        return
    with open_binary(path, compression) as file:
        for line, content in enumerate(file, start=1):
            try:
                text = content.decode()
                row = json.loads(text) if kind is Format.JSONL and text.strip() else text
            except ValueError as error:
                raise ValueError(
                    f"{path}:{line} is no row of a benchmark ({error}); correct the file"
                ) from error
            if text.strip():
                yield line, "\n".join(_strings(row))


def _parquet_rows(path: str) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path) as file:
        batches = (batch.to_pylist() for batch in file.iter_batches(256))
        for line, row in enumerate(chain.from_iterable(batches), start=1):
            yield line, "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
