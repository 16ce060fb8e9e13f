"""Questions that are also in an evaluation file.

A question is dropped if its normalised text equals any normalised text in a row of such a file, or if it shares
a run of 13 words (Chinese: 13 characters) with a row, as documents are in preparing data. Questions of a few
words can only match as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fbs_rl.data.decontamination import BenchmarkIndex, benchmark_rows, ngram_size
from fbs_rl.data.manifest import file_sha256
from fbs_rl.data.prepare_config import DecontaminationConfig
from fbs_rl.data.script_spans import document_language
from fbs_rl.data.shingles import ngram_hashes, unit_hashes
from fbs_rl.rl.question_files import QuestionFile, csv_compression, find_files, is_table
from fbs_rl.rl.question_readers import read_rows, rows_text, set_and_subject
from fbs_rl.rl.questions import SourceQuestion, normalised


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row of an evaluation file that a question is in. exact: the whole question, not a run of words."""

    exact: bool
    row: str


@dataclass(slots=True)
class EvaluationRows:
    """What was read of one evaluation file. excluded: rows of subjects that evaluation leaves out."""

    name: str
    sha256: str
    rows: int = 0
    excluded: int = 0


@dataclass(slots=True)
class EvaluationIndex:
    """Texts and hashed runs of words of all evaluation files. exact: normalised text -> "file:line"."""

    files: list[EvaluationRows] = field(default_factory=list)
    exact: dict[str, str] = field(default_factory=dict)
    runs: BenchmarkIndex = field(default_factory=lambda: BenchmarkIndex({}, (), 0))

    @classmethod
    def read(cls, words: Sequence[str], carve_out: frozenset[str]) -> EvaluationIndex:
        """The index of the files that `words` mean. carve_out: "set/subject" of rows that are not evaluated.

        Raises FileNotFoundError, OSError or ValueError, in one sentence, for a file or row that cannot be read:
        an overlap in it would go unseen.
        """
        index, config = cls(), DecontaminationConfig()
        labels: list[str] = []
        hashes: dict[int, list[tuple[np.ndarray, int]]] = {}
        too_short = 0
        for file in (file for word in words for file in find_files(word)):
            index.files.append(EvaluationRows(file.name, file_sha256(Path(file.path))))
            for line, texts in _evaluated_rows(file, carve_out, index.files[-1]):
                label = f"{file.name}:{line}"
                for text in texts:
                    index.exact.setdefault(normalised(text), label)
                whole = "\n".join(texts)
                size, units = ngram_size(document_language(whole), config), unit_hashes(whole)
                if len(units) < size:
                    too_short += 1
                    continue
                hashes.setdefault(size, []).append((ngram_hashes(units, size), len(labels)))
                labels.append(label)
        index.exact.pop("", None)
        index.runs = BenchmarkIndex(
            {size: _sorted(parts) for size, parts in hashes.items()}, tuple(labels), too_short
        )
        return index

    def find(self, question: SourceQuestion) -> Overlap | None:
        """The row that the question is in, or None."""
        row = self.exact.get(normalised(question.text))
        if row is not None:
            return Overlap(True, row)
        row = self.runs.match(unit_hashes("\n".join((question.text, *question.choices))))
        return None if row is None else Overlap(False, row)


def _evaluated_rows(
    file: QuestionFile, carve_out: frozenset[str], counts: EvaluationRows
) -> Iterator[tuple[int, list[str]]]:
    """Line and texts of each row; rows of the carve-out are only counted."""
    if csv_compression(file.path) is None and not is_table(file.path):
        for line, text in benchmark_rows(file.path):  # plain text, .json
            counts.rows += 1
            yield line, [text]
        return
    for line, row in read_rows(file.path):
        counts.rows += 1
        if isinstance(row, str):
            raise ValueError(f"{file.name}:{line} {row}; correct the evaluation file")
        if set_and_subject(row, file.place) in carve_out:
            counts.excluded += 1
            continue
        yield line, list(rows_text(row))


def _sorted(parts: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """All hashes, each once, ascending, with the row that has it first."""
    grams = np.concatenate([hashes for hashes, _ in parts])
    lengths = [len(hashes) for hashes, _ in parts]
    unique, first = np.unique(grams, return_index=True)
    return unique, np.repeat(np.array([row for _, row in parts], np.uint32), lengths)[first]
