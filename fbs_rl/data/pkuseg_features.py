"""The features of pkuseg's word segmenter, computed about five times as fast as pkuseg computes them.

For each character pkuseg builds some 130 strings and looks each up among 2.6 million. Here the numbers of
the features of a character, of two neighbours, of a word and of two words that meet are remembered, and
words are looked for only where a word of the dictionary starts with the same two characters. The lists are
the same, element by element and in the same order, so that sums over them are the same to the last bit
(tests/test_segmenter.py compares them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeVar

_WORD_MAX, _WORD_MIN = 6, 2
_MAX_REMEMBERED = 1_000_000  # entries per table: bounds the memory to some hundred MB

# One character for each class of characters that pkuseg does not tell apart. Lone surrogates, because no
# word and no feature of the model holds one; those of the text become a third.
_NUMBER, _LETTER, _SURROGATE = "\ud800", "\ud801", "\ud802"
_NAMES = {_NUMBER: "**Num", _LETTER: "**Letter"}

Features = tuple[int, ...]
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class FeatureLists:
    """What pkuseg's FeatureExtractor.get_node_features_idx returns, for all characters of a piece at once.

    For the model that pkuseg ships: there, a word absent from the dictionary has no features.
    """

    def __init__(self, extractor: Any) -> None:
        """`extractor`: the loaded pkuseg.feature_extractor.FeatureExtractor."""
        self._index: dict[str, int] = extractor.feature_to_idx
        assert not any("**noWord" in feature for feature in self._index)
        self._translation = _translation(extractor)
        # One object per word, so that its hash is computed once.
        self._word = {word: word for word in extractor.unigram}
        self._lengths = word_lengths(word for word in self._word if len(word) <= _WORD_MAX)
        self._of_char: dict[str, tuple[Features, ...]] = {}
        self._of_pair: dict[str, tuple[Features, ...]] = {}
        self._of_word: dict[str, tuple[Features, Features]] = {}
        self._of_meeting: dict[tuple[str, str], tuple[Features, Features]] = {}

    def __call__(self, text: str) -> list[list[int]]:
        """Feature numbers per character of a text."""
        text = text.translate(self._translation)
        lists = self._character_features(text)
        ending, starting = self._dictionary_words(text)
        of_word = self._of_word
        after: list[int] = []
        for i, features in enumerate(lists):
            ended, started, next_started = ending[i + 1], starting[i], starting[i + 1]
            for word in ended:
                features += (of_word.get(word) or self._new_word(word))[0]
            for word in started:
                features += (of_word.get(word) or self._new_word(word))[1]
            features += after
            after = []
            if ended and next_started:
                for left in ended:
                    for right in next_started:
                        pair = left, right
                        found = self._of_meeting.get(pair) or self._new_meeting(pair)
                        after += found[0]
                        features += found[1]
        return lists

    def _character_features(self, text: str) -> list[list[int]]:
        of_char, of_pair = self._of_char, self._of_pair
        chars = [of_char.get(char) or self._new_char(char) for char in text]
        pairs = [of_pair.get(pair) or self._new_pair(pair) for pair in map("".join, pairwise(text))]
        last = len(text) - 1
        lists: list[list[int]] = []
        for i, own in enumerate(chars):
            features = [0, *own[0]]
            if i > 0:
                features += chars[i - 1][1]
                features += pairs[i - 1][0]
            if i < last:
                features += chars[i + 1][2]
                features += pairs[i][1]
            if i > 1:
                features += chars[i - 2][3]
                features += pairs[i - 2][2]
            if i + 1 < last:
                features += chars[i + 2][4]
            lists.append(features)
        return lists

    def _dictionary_words(self, text: str) -> tuple[list[list[str]], list[list[str]]]:
        """For each of the places 0 to len(text) the dictionary words that end there, and those that start
        there, longest first."""
        ending: list[list[str]] = [[] for _ in range(len(text) + 1)]
        starting: list[list[str]] = [[] for _ in range(len(text) + 1)]
        for i in range(len(text) - 1):
            for length in self._lengths.get(text[i : i + _WORD_MIN], ()):
                word = self._word.get(text[i : i + length])
                if word is not None and i + length <= len(text):
                    starting[i].append(word)
                    ending[i + length].append(word)
        return ending, starting

    def _number(self, feature: str) -> Features:
        number = self._index.get(feature)
        return () if number is None else (number,)

    def _new_char(self, char: str) -> tuple[Features, ...]:
        node = _NAMES.get(char, char)
        found = tuple(self._number(name + node) for name in ("c.", "c-1.", "c1.", "c-2.", "c2."))
        return _remember(self._of_char, char, found)

    def _new_pair(self, pair: str) -> tuple[Features, ...]:
        both = ".".join(_NAMES.get(char, char) for char in pair)
        found = tuple(self._number(name + both) for name in ("c-1c.", "cc1.", "c-2c-1."))
        return _remember(self._of_pair, pair, found)

    def _new_word(self, word: str) -> tuple[Features, Features]:
        found = self._number("w-1." + word), self._number("w1." + word)
        return _remember(self._of_word, word, found)

    def _new_meeting(self, pair: tuple[str, str]) -> tuple[Features, Features]:
        """Features of two words side by side: for the first node of the second, and the last of the first."""
        both = "*".join(pair)
        found = self._number("ww.l." + both), self._number("ww.r." + both)
        return _remember(self._of_meeting, pair, found)


def word_lengths(words: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Which lengths, in characters and longest first, the words with the same first two characters have."""
    lengths: defaultdict[str, set[int]] = defaultdict(set)
    for word in words:
        if len(word) >= _WORD_MIN:
            lengths[word[:_WORD_MIN]].add(len(word))
    return {key: tuple(sorted(found, reverse=True)) for key, found in lengths.items()}


def _translation(extractor: Any) -> dict[int, str]:
    table = {ord(surrogate): _SURROGATE for surrogate in (_NUMBER, _LETTER)}
    table |= {place: chr(mapped) for place, mapped in extractor.keywords_translate_table.items()}
    for chars, name in ((extractor.letter, _LETTER), (extractor.num, _NUMBER)):
        # pkuseg renames the keyword characters before it looks for numbers, so "." is not one here.
        table |= {ord(char): name for char in chars if char not in extractor.keywords}
    return table


def _remember(table: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    if len(table) >= _MAX_REMEMBERED:
        table.clear()
    table[key] = value
    return value
