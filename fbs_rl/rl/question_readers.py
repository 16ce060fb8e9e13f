"""Questions of benchmark files: MMLU, CMMLU, C-Eval, and JSONL of one's own.

Known layouts, told apart by what a file holds:

* CSV without a header (MMLU as published): question, options, letter; `dev/anatomy_dev.csv`.
* CSV with one (CMMLU `dev/agronomy.csv`, C-Eval `val/accountant_val.csv`): question, A, B, ..., answer.
* Parquet or JSONL, as on the Hugging Face hub: the same columns, or question, choices, answer (a letter, the
  number of the option from 0, or its text), subject.
* JSONL of {question, answer} without options, or {prompt, answer} that no format changes.

A row that cannot be used is counted and reported with its file and line.
"""

from __future__ import annotations

import csv
import io
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

from fbs_rl.data.readers import DAMAGED, Format, format_of, open_binary
from fbs_rl.data.script_spans import document_language
from fbs_rl.rl.question_files import Place, QuestionFile, csv_compression
from fbs_rl.rl.questions import SourceQuestion

LETTERS = string.ascii_uppercase
LICENCES = {
    "mmlu": "MIT",
    "cmmlu": "CC BY-NC-SA 4.0",
    "ceval": "CC BY-NC-SA 4.0",
    "cmath": "MIT",
    "gsm8k": "MIT",
}
"""Of the sets as their authors publish them; a row's own `licence` field counts for more."""
_LANGUAGES = {"mmlu": "en", "gsm8k": "en", "cmmlu": "zh", "ceval": "zh", "cmath": "zh"}
_TEXTS = ("question", "Question", "input")
_ANSWERS = ("answer", "Answer", "golden")
_INDICES = ("index", "id", "")  # CMMLU's first column has no name
_MMLU_COLUMNS = 6
_EXAMPLES = 5

Row = tuple[int, dict[str, Any] | str]
"""Line from 1 (Parquet: row) and the fields, or what is wrong with the line."""


class UnusableRowError(ValueError):
    """Why a row is no question."""


@dataclass(slots=True)
class ReadCounts:
    """What became of the rows of some files. test_rows: of test splits, left unread.

    examples: "file:line problem" of the first malformed ones.
    """

    rows: int = 0
    test_rows: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)

    def add_malformed(self, where: str, problem: str, limit: int) -> None:
        """Raises ValueError for one more than `limit`."""
        self.malformed += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where} {problem}")
        if self.malformed > limit:
            raise ValueError(
                f"{self.malformed} rows are no questions, more than the limit of {limit}; the first: "
                f"{self.examples[0]}"
            )


def read_questions(
    file: QuestionFile, counts: ReadCounts, malformed_limit: int, carve_out: frozenset[str]
) -> Iterator[SourceQuestion]:
    """The questions of one file, in its order; rows and malformed ones are added to `counts`.

    Questions of a test split are for evaluation: they are left out, unless `carve_out` names their
    "set/subject". Raises ValueError, naming the first one, at more than `malformed_limit` malformed rows in
    `counts`, and for a file that cannot be read to its end.
    """
    numbers: Counter[tuple[str, str]] = Counter()
    for line, row in read_rows(file.path):
        counts.rows += 1
        where = f"{file.name}:{line}"
        if isinstance(row, str):
            counts.add_malformed(where, row, malformed_limit)
            continue
        row = _unwrapped(row)
        source, subject = _set_and_subject(row, file.place)
        split = str(row.get("split") or file.place.split)
        index = next((str(row[n]) for n in _INDICES if _given(row.get(n))), "")
        index = index or str(numbers[subject, split])
        numbers[subject, split] += 1
        if split == "test" and f"{source}/{subject}" not in carve_out:
            counts.test_rows += 1
            continue
        try:
            yield _question(row, source, (subject, split, index), where)
        except UnusableRowError as error:
            counts.add_malformed(where, str(error), malformed_limit)


def read_rows(path: str) -> Iterator[Row]:
    """Rows of a CSV, JSONL or Parquet file (CSV and JSONL also as .gz or .zst).

    Raises ValueError, naming the file, for one that is damaged or of an unknown kind.
    """
    compression = csv_compression(path)
    kind = Format.TEXT
    if compression is None:
        kind, compression = format_of(path)
        if kind is Format.PARQUET:
            yield from _parquet_rows(path)
            return
        if kind is Format.TEXT:
            raise ValueError(f"{path} is plain text; questions come as CSV, JSONL or Parquet")
    try:
        with open_binary(path, compression) as file:
            yield from _json_rows(file, path) if kind is Format.JSONL else _csv_rows(file, path)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); get the file again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it") from error


def _csv_rows(file: Any, path: str) -> Iterator[Row]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        header: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                start, line = line, reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = _header(cells)
                    if header is cells:
                        continue
                if len(cells) != len(header):
                    yield start, f"has {len(cells)} columns, not {len(header)}"
                else:
                    yield start, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} is no CSV ({error}); correct it") from error


def _header(first: list[str]) -> list[str]:
    """The header itself if the first row is one, else the names of MMLU's columns."""
    if any(name in first for name in (*_TEXTS, "prompt")):
        return first
    if len(first) < 4:
        return [f"column {n}" for n in range(len(first))]
    return ["question", *LETTERS[: len(first) - 2], "answer"]


def _json_rows(file: Any, path: str) -> Iterator[Row]:
    for line, content in enumerate(file, start=1):
        if content.isspace():
            continue
        try:
            row = json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield line, "is not UTF-8"
        except (ValueError, RecursionError) as error:
            if line == 1 and content.strip() in (b"[", b"{"):
                raise ValueError(f"{path} is one JSON value; write one object a line") from error
            yield line, f"is not JSON ({' '.join(str(error).split())[:80]})"
        else:
            if isinstance(row, list) and line == 1:
                raise ValueError(f"{path} is one JSON array; write one object a line")
            yield line, row if isinstance(row, dict) else "is no JSON object"


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(256))
            yield from enumerate(chain.from_iterable(batches), start=1)
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} cannot be read as Parquet ({reason}); get the file again"
        ) from error


def _unwrapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row inside the one column `train`, which MMLU's auxiliary questions have on the hub."""
    inner = row.get("train")
    return inner if len(row) == 1 and isinstance(inner, dict) else row


def set_and_subject(row: Mapping[str, Any], place: Place) -> str:
    """ "mmlu/anatomy": what a carve-out names."""
    return "/".join(_set_and_subject(row, place))


def _set_and_subject(row: Mapping[str, Any], place: Place) -> tuple[str, str]:
    subject = row.get("subject") or row.get("category") or place.subject
    return _set_name(row, place.source), str(subject)


def _set_name(row: Mapping[str, Any], named: str) -> str:
    """Name of the set: the row's, the path's, or that of the set which has such columns."""
    own = row.get("source")
    if isinstance(own, str) and own:
        return own
    if named in LICENCES:
        return named
    if {"Question", "A", "B", "Answer"} <= row.keys():
        return "cmmlu"
    if {"id", "question", "A", "B", "answer"} <= row.keys():
        return "ceval"
    if list(row) == ["question", *LETTERS[: _MMLU_COLUMNS - 2], "answer"]:
        return "mmlu"
    return named or "questions"


def _question(
    row: Mapping[str, Any], source: str, place: tuple[str, str, str], where: str
) -> SourceQuestion:
    """The question in a row. Raises UnusableRowError."""
    verbatim = isinstance(row.get("prompt"), str)
    text = _text(row, ("prompt",) if verbatim else _TEXTS, "question")
    choices = () if verbatim else _choices(row)
    given = next((row[name] for name in _ANSWERS if _given(row.get(name))), None)
    if given is None:
        raise UnusableRowError(f"has no answer ({', '.join(_ANSWERS)})")
    gold = _gold(given, choices) if choices else None
    answer = str(given) if gold is None else choices[gold]
    for part in (text, answer, *choices):
        _check_text(part)
    language = row.get("language") or row.get("lang") or _LANGUAGES.get(source)
    if language not in ("en", "zh"):
        language = "en" if document_language("\n".join((text, *choices))) == "en" else "zh"
    return SourceQuestion(
        source, *place,
        text=text if verbatim else text.strip(),
        choices=choices,
        gold=gold,
        answer=answer if verbatim else answer.strip(),
        language=language,
        verbatim=verbatim,
        licence=str(row.get("licence") or row.get("license") or LICENCES.get(source, "")),
        row=where,
    )  # fmt: skip


def _text(row: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    found = next((row[name] for name in names if name in row), None)
    if not isinstance(found, str) or not found.strip():
        raise UnusableRowError(f"has no {what} ({', '.join(names)})")
    return found


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The options, stripped: the list `choices`, or the columns A, B, ... as far as they go."""
    given = row.get("choices")
    if given is None:
        given = [row[letter] for letter in takewhile(lambda n: _given(row.get(n)), LETTERS)]
        if not given and not any(letter in row for letter in "ABCD"):
            return ()
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise UnusableRowError(f"needs 2 to {len(LETTERS)} choices")
    if not all(isinstance(choice, str | int | float) for choice in given):
        raise UnusableRowError("has a choice that is no text")
    choices = tuple(str(choice).strip() for choice in given)
    if not all(choices):
        raise UnusableRowError("has an empty choice")
    return choices


def _gold(given: Any, choices: tuple[str, ...]) -> int:
    """Number of the right option, given as a letter, a number from 0, or (where unmistakable) as its text."""
    if isinstance(given, int) and not isinstance(given, bool):
        if 0 <= given < len(choices):
            return given
        raise UnusableRowError(f"has the answer {given}, but {len(choices)} choices, from 0")
    answer = str(given).strip()
    if len(answer) == 1 and answer.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(answer.upper())
    if choices.count(answer) == 1:
        return choices.index(answer)
    raise UnusableRowError(f"has the answer {answer[:40]!r}, which is none of its choices")


def _given(value: Any) -> bool:
    return (
        value is not None and value != "" and value == value
    )  # NaN, of a Parquet column with gaps


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRowError("holds half a surrogate pair, which no UTF-8 text can") from error


def rows_text(row: Mapping[str, Any]) -> Iterator[str]:
    """All strings of a row, in its order."""
    for value in row.values():
        yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from rows_text(value)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
