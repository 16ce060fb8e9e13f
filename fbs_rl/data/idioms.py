"""The list of Chinese idioms, and where they stand in a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from fbs_rl.data.script_spans import HAN_RUN

_KEY_CHARS = 2


class IdiomLexicon:
    """A set of idioms, searched for the longest match."""

    def __init__(self, words: Iterable[str]) -> None:
        """Raises ValueError for a word that is not two or more Han characters."""
        self.words = frozenset(words)
        by_key: defaultdict[str, list[str]] = defaultdict(list)
        for word in sorted(self.words, key=len, reverse=True):
            if len(word) < _KEY_CHARS or not HAN_RUN.fullmatch(word):
                raise ValueError(
                    f"an idiom must be two or more Han characters and nothing else, got {word!r}"
                )
            by_key[word[:_KEY_CHARS]].append(word)
        # Almost all positions of a text are refused by one look-up of two characters.
        self._by_key = {key: tuple(listed) for key, listed in by_key.items()}

    def __len__(self) -> int:
        return len(self.words)

    def find(self, text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """Disjoint spans in text[start:end]: from left to right the longest idiom at each place."""
        by_key, spans = self._by_key, []
        end = len(text) if end is None else end
        place = start
        while place < end - 1:
            for word in by_key.get(text[place : place + _KEY_CHARS], ()):
                if text.startswith(word, place, end):
                    spans.append((place, place + len(word)))
                    place += len(word) - 1
                    break
            place += 1
        return spans


@lru_cache(maxsize=4)
def load_lexicon(path: str | None = None) -> IdiomLexicon:
    """The idioms of a UTF-8 file, one a line, blank lines ignored; without a path the list that ships.

    Read once a process. Raises FileNotFoundError if there is no such file, ValueError if it is not
    UTF-8, holds no idiom, or holds a line that is not an idiom.
    """
    source = files("fbs_rl.data") / "lexicon" / "idioms.txt" if path is None else Path(path)
    if not source.is_file():
        raise FileNotFoundError(
            f"there is no idiom list {path}; give a UTF-8 text file with one idiom a line"
        )
    try:
        lines = source.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the idiom list {path} is not UTF-8 (byte {error.start})") from error
    words = [word for line in lines if (word := line.strip())]
    if not words:
        raise ValueError(f"the idiom list {path} holds no idiom; give one idiom a line")
    try:
        return IdiomLexicon(words)
    except ValueError as error:
        raise ValueError(f"the idiom list {path}: {error}") from error
