"""How many near-duplicates are found: documents with known edits, judged by exact Jaccard similarity.

The judge is independent of what it judges: shingles are tuples of strings from a regular expression,
similarities are those of Python sets.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fbs_rl.data.near_duplicates import Clusters, band_keys, join_similar, signatures
from fbs_rl.data.prepare_config import NearDuplicateConfig
from fbs_rl.data.shingles import ngram_hashes, unit_hashes

EDIT_RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.15)
"""Share of words (Chinese: characters) replaced, dropped or doubled."""
_DOCUMENT_CHARS = 3000
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff"
_UNIT = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_PIECE = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+|[\W_]+")


@dataclass(frozen=True, slots=True)
class RateOutcome:
    """Copies with one rate of edits. similarity: their mean exact Jaccard similarity to the original."""

    edit_rate: float
    copies: int
    similarity: float
    removed: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome for one language.

    duplicates: documents with an earlier one of their family at or above the threshold, by the exact measure;
    found: those of them that were removed. removed: all that were removed among copies; right: those of them
    with such an earlier document. clear_recall, clear_precision: the same, leaving out documents whose
    similarity is within `margin` of the threshold, where the estimate cannot tell.
    """

    language: str
    rates: tuple[RateOutcome, ...]
    duplicates: int
    found: int
    removed: int
    right: int
    margin: float
    clear_recall: float
    clear_precision: float

    @property
    def recall(self) -> float:
        return self.found / max(1, self.duplicates)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.removed)


def judge(language: str, originals: Sequence[str], config: NearDuplicateConfig) -> Judgement:
    """Plant copies of the documents, remove near-duplicates, compare with exact similarities."""
    assert config.threshold is not None
    chance = random.Random(0)
    size = config.shingle_chars if language == "zh" else config.shingle_words
    family = 1 + len(EDIT_RATES)
    documents: list[str] = []
    nearest: list[float] = []
    to_original: list[float] = []
    for original in originals:
        members = [original[:_DOCUMENT_CHARS]]
        members += [edited(members[0], rate, chance) for rate in EDIT_RATES]
        sets = [shingle_set(member, size) for member in members]
        for number, one in enumerate(sets):
            nearest.append(max((jaccard(one, other) for other in sets[:number]), default=0.0))
            to_original.append(jaccard(one, sets[0]))
        documents += members
    removed = removed_documents(documents, size, config)
    similarity, original_similarity = np.array(nearest), np.array(to_original)
    copy = np.arange(len(documents)) % family
    threshold, planted = config.threshold, copy > 0
    margin = 2 * float(np.sqrt(threshold * (1 - threshold) / config.permutations))
    duplicate = planted & (similarity >= threshold)
    clear = planted & (np.abs(similarity - threshold) > margin)
    return Judgement(
        language=language,
        rates=tuple(
            RateOutcome(
                rate,
                len(originals),
                float(original_similarity[copy == number].mean()),
                int(removed[copy == number].sum()),
            )
            for number, rate in enumerate(EDIT_RATES, start=1)
        ),
        duplicates=int(duplicate.sum()),
        found=int((duplicate & removed).sum()),
        removed=int((planted & removed).sum()),
        right=int((duplicate & removed).sum()),
        margin=margin,
        clear_recall=_share(removed, clear & duplicate),
        clear_precision=_share(duplicate, clear & removed),
    )


def _share(which: np.ndarray, among: np.ndarray) -> float:
    return float(which[among].mean()) if among.any() else 1.0


def removed_documents(
    documents: Sequence[str], size: int, config: NearDuplicateConfig
) -> np.ndarray:
    """Which documents the filter removes, bool [documents]."""
    assert config.threshold is not None
    shingles = [ngram_hashes(unit_hashes(text), size) for text in documents]
    sketches = signatures(shingles, config.permutations)
    clusters, numbers = Clusters(len(documents)), np.arange(len(documents))
    for keys in band_keys(sketches, config.threshold):
        join_similar(
            clusters,
            keys,
            numbers,
            lambda one, other: (sketches[one] == sketches[other]).mean(axis=1),
            config.threshold,
        )
    return clusters.first_of(numbers) != numbers


def shingle_set(text: str, size: int) -> set[tuple[str, ...]]:
    """Runs of `size` words or Chinese characters, lower-cased; the whole of a shorter text."""
    units = _UNIT.findall(text.lower())
    return {tuple(units[i : i + size]) for i in range(max(1, len(units) - size + 1))}


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def edited(text: str, rate: float, chance: random.Random) -> str:
    """The text with that share of its words (Chinese: characters) replaced by others of it, dropped or doubled."""
    pieces = _PIECE.findall(text)
    words = [piece for piece in pieces if _UNIT.fullmatch(piece)]
    made = []
    for piece in pieces:
        if chance.random() >= rate or not _UNIT.fullmatch(piece):
            made.append(piece)
            continue
        kind = chance.randrange(3)
        if kind == 0:
            made.append(chance.choice(words))
        elif kind == 1:
            made += [piece, " ", piece]
    return "".join(made)
