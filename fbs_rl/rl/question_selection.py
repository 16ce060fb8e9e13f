"""Which questions of the sources become prompts, and what each filter removed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fbs_rl.data.manifest import file_sha256
from fbs_rl.rl.question_files import QuestionFile, find_files
from fbs_rl.rl.question_overlap import EvaluationIndex
from fbs_rl.rl.question_readers import ReadCounts, read_questions
from fbs_rl.rl.questions import SourceQuestion

_EXAMPLES = 5


class Removal(StrEnum):
    """Why a question is not in the pool, in the order in which the reasons are looked for."""

    TEST_SPLIT = "of a test split"
    DUPLICATE = "duplicate"
    EVALUATED = "in an evaluation file"
    SHARES_RUN = "shares a run of words with an evaluation file"
    TOO_LONG = "prompt too long"


@dataclass(slots=True)
class SourceCounts:
    """What was read of one file."""

    name: str
    sha256: str
    bytes: int
    rows: int = 0
    malformed: int = 0
    kept: int = 0


@dataclass(slots=True)
class Selection:
    """The questions that passed, in input order, and the accounts.

    examples: reason -> "id: detail". carved: "set/subject" of questions read from a test split.
    """

    kept: list[SourceQuestion] = field(default_factory=list)
    sources: list[SourceCounts] = field(default_factory=list)
    counts: ReadCounts = field(default_factory=ReadCounts)
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    carved: set[str] = field(default_factory=set)

    def remove(self, question_id: str, reason: Removal, detail: str) -> None:
        self.removed[reason.value] += 1
        listed = self.examples.setdefault(reason.value, [])
        if len(listed) < _EXAMPLES:
            listed.append(f"{question_id}: {detail}")

    @property
    def account(self) -> str:
        """Why so many rows are so few questions, for a sentence."""
        reasons = [f"{count} {reason}" for reason, count in self.removed.items()]
        if self.counts.malformed:
            reasons.append(f"{self.counts.malformed} malformed")
        return f"{self.counts.rows} rows" + (f", of them {', '.join(reasons)}" if reasons else "")


def select_questions(
    words: Sequence[str],
    evaluation: EvaluationIndex,
    carve_out: frozenset[str],
    malformed_limit: int,
) -> Selection:
    """Read all sources and filter.

    The first of several equal questions stays. Questions of a test split are left out unless `carve_out` names
    their "set/subject". Raises FileNotFoundError, OSError or ValueError, in one sentence.
    """
    selection, first = Selection(), dict[str, str]()
    for file in _files(words):
        account = SourceCounts(file.name, file_sha256(Path(file.path)), os.path.getsize(file.path))
        selection.sources.append(account)
        rows, malformed = selection.counts.rows, selection.counts.malformed
        for question in read_questions(file, selection.counts, malformed_limit, carve_out):
            if question.split == "test":
                selection.carved.add(f"{question.source}/{question.subject}")
            found = _objection(question, first, evaluation)
            if found is not None:
                selection.remove(question.id, *found)
            else:
                first[question.key] = question.id
                selection.kept.append(question)
                account.kept += 1
        account.rows = selection.counts.rows - rows
        account.malformed = selection.counts.malformed - malformed
    if selection.counts.test_rows:
        selection.removed[Removal.TEST_SPLIT.value] = selection.counts.test_rows
    return selection


def _files(words: Sequence[str]) -> Iterator[QuestionFile]:
    seen: set[str] = set()
    for file in (file for word in words for file in find_files(word)):
        real = os.path.realpath(file.path)
        if real not in seen:
            seen.add(real)
            yield file


def _objection(
    question: SourceQuestion, first: dict[str, str], evaluation: EvaluationIndex
) -> tuple[Removal, str] | None:
    if question.key in first:
        return Removal.DUPLICATE, first[question.key]
    overlap = evaluation.find(question)
    if overlap is None:
        return None
    return (Removal.EVALUATED if overlap.exact else Removal.SHARES_RUN), overlap.row
