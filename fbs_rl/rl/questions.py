"""A question: what an episode starts from."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from fbs_rl.data.script_spans import HAN


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its gold answer.

    id: unique in its pool and stable, such as "mmlu/anatomy/dev/3". prompt: ends where the answer begins.
    answer: the gold text that is scored, answer prefix and gold option. language: "en" or "zh".
    """

    id: str
    prompt: str
    answer: str
    language: str
    subject: str
    source: str


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """Token ids of a question; what is scored are the `answer_ids` after the `prompt_ids`."""

    id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceQuestion:
    """A question as a file states it, before it is put in a format.

    source: name of the set. subject, split, index: place in it; subject and split may be "". text: the question
    alone. choices: option texts without letters; () for an open question. gold: number of the right option.
    answer: gold text. verbatim: `text` is a whole prompt and `answer` what follows it, no format applies.
    licence: "" where it is not known. row: "file:line".
    """

    source: str
    subject: str
    split: str
    index: str
    text: str
    choices: tuple[str, ...]
    gold: int | None
    answer: str
    language: str
    verbatim: bool = False
    licence: str = ""
    row: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.answer.strip():
            raise ValueError("a question needs a text and an answer")
        if bool(self.choices) != (self.gold is not None):
            raise ValueError("a question has choices and the number of the right one, or neither")
        if self.gold is not None and self.choices[self.gold] != self.answer:
            raise ValueError(f"option {self.gold} is not the answer {self.answer!r}")

    @property
    def id(self) -> str:
        """Such as "mmlu/anatomy/dev/3"."""
        return "/".join(
            part for part in (self.source, self.subject, self.split, self.index) if part
        )

    @property
    def key(self) -> str:
        """What makes two questions the same: normalised text and options, in any order; 32 hex digits."""
        parts = [normalised(self.text), *sorted(map(normalised, self.choices))]
        return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


_SPACE_AT_HAN = re.compile(rf"(?<={HAN.pattern}) | (?={HAN.pattern})")


def normalised(text: str) -> str:
    """The text as it is compared: NFKC, case folded, runs of punctuation and white space as one space.

    Symbols (+ = < $) stay. Beside a Han character the space goes too, since Chinese is written without.
    A text of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.translate(_SEPARATORS).split())
    return _SPACE_AT_HAN.sub("", spaced) or folded.strip()


class _Separators(dict[int, str]):
    """A table for str.translate that is filled as characters come: a space for punctuation and controls."""

    def __missing__(self, point: int) -> str:
        char = chr(point)
        self[point] = " " if unicodedata.category(char)[0] in "PZC" else char
        return self[point]


_SEPARATORS = _Separators()
