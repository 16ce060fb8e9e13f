"""Chinese word segmentation by pkuseg, as spans of the text.

pkuseg drops white space and otherwise returns the characters it was given, in order, so the words of a
piece without white space follow one another without gap. That is why texts are cut at white space here.
The steps of pkuseg.cut are taken one by one, to leave out the work that changes nothing.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from fbs_rl.data.pkuseg_features import FeatureLists, word_lengths

MAX_PIECE_CHARS = 512
_ENDS, _CLOSERS = "。！？；…", "”’」』）】》"
# A sentence with the punctuation that ends it. White space ends a piece too; so does MAX_PIECE_CHARS, which
# bounds the memory for text without punctuation and may cut a word.
_PIECE = re.compile(
    rf"[^\s{_ENDS}]{{1,{MAX_PIECE_CHARS}}}(?:[{_ENDS}]{{1,16}}[{_CLOSERS}]{{0,4}})?|[{_ENDS}]{{1,16}}[{_CLOSERS}]{{0,4}}"
)
_MAX_MERGED_WORDS = 7


def segment(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Words of text[start:end] as spans of `text`, in order; they leave out white space only."""
    segmenter = load_segmenter()
    spans: list[tuple[int, int]] = []
    for piece in _PIECE.finditer(text, start, len(text) if end is None else end):
        place = piece.start()
        for word in segmenter.words(piece.group()):
            spans.append((place, place + len(word)))
            place += len(word)
    return spans


class WordSegmenter:
    """pkuseg's default model without part-of-speech tags: 5 s to load, some 650 MB."""

    def __init__(self) -> None:
        import pkuseg
        from pkuseg import inference  # pyright: ignore[reportAttributeAccessIssue]

        loaded = pkuseg.pkuseg()
        loaded.feature_extractor.bigram.clear()  # read in training only; 100 MB
        self._features = FeatureLists(loaded.feature_extractor)
        self._model = loaded.model
        self._decode = inference.decodeViterbi_fast
        self._opens = [loaded.idx_to_tag[tag].startswith("B") for tag in range(loaded.n_tag)]
        self._merge = _WordMerger(loaded.postprocesser)

    def words(self, piece: str) -> list[str]:
        """The words of a text without white space; joined they are the text."""
        _, tags = self._decode(self._features(piece), self._model)
        opens = self._opens
        starts = [i for i, tag in enumerate(tags) if i == 0 or opens[tag]]
        words = [piece[a:b] for a, b in zip(starts, [*starts[1:], len(piece)], strict=True)]
        return self._merge(words)


class _WordMerger:
    """pkuseg's postprocessor: joins 2 to 7 words whose concatenation is in the dictionary, where the parts are
    not all words of it themselves. Run only where it would join something."""

    def __init__(self, postprocesser: Any) -> None:
        self._postprocesser = postprocesser
        self._known: set[str] = postprocesser.other_words
        self._lengths = word_lengths(self._known)

    def __call__(self, words: list[str]) -> list[str]:
        return self._postprocesser(words) if self._joins_any(words) else words

    def _joins_any(self, words: list[str]) -> bool:
        text, place = "".join(words), 0
        for i, word in enumerate(words):
            lengths = self._lengths.get(text[place : place + 2])
            if lengths and lengths[0] > len(word) and self._joins(text, place, words, i, lengths):
                return True
            place += len(word)
        return False

    def _joins(
        self, text: str, place: int, words: list[str], first: int, lengths: tuple[int, ...]
    ) -> bool:
        """Whether any two or more words from `first` on, which starts at `place`, would be joined."""
        known, total = self._known, len(words[first])
        for last in range(first + 1, min(first + _MAX_MERGED_WORDS, len(words))):
            total += len(words[last])
            if total > lengths[0]:
                return False
            if total in lengths and text[place : place + total] in known:
                parts = words[first : last + 1]
                if not all(part in known for part in parts):
                    return True
        return False


@lru_cache(maxsize=1)
def load_segmenter() -> WordSegmenter:
    """The one word segmenter of this process."""
    return WordSegmenter()
