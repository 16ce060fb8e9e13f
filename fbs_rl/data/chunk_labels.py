"""Chinese chunk pseudo-labels for the boundary head, and their coverage (SPEC 3.5).

A chunk is an idiom of the lexicon, or a word of the segmenter that no idiom overlaps. Where an idiom cuts
into a word, the whole word is dropped: what the idiom leaves of it is no unit of the segmenter.

T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fbs_rl.data.idioms import load_lexicon
from fbs_rl.data.script_spans import CLAUSE, clause_spans, han_frac, zh_spans
from fbs_rl.data.segmenter import segment
from fbs_rl.types import B_LABEL, I_LABEL, IGNORED_LABEL, O_LABEL, S_LABEL

Labels = NDArray[np.int8]
ClauseIds = NDArray[np.int32]
Spans = Sequence[tuple[int, int]]
Offsets = Spans | NDArray[np.integer]
"""Per token, the characters [start, end) it stands for: `offset_mapping` of a fast tokenizer."""


class Chunk(NamedTuple):
    """Characters [start, end) that are read as one unit."""

    start: int
    end: int
    idiom: bool


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """Pseudo-labels of one document.

    labels_T: BIOS class (fbs_rl.types), O for Chinese tokens outside all chunks, IGNORED_LABEL for
        tokens of other text and tokens that stand for no characters.
    clause_T: the clause a token belongs to, counted from 0 in the document; -1: none (other text,
        punctuation). A token that reaches into two clauses belongs to the first.
    coverage: ρ, the share of clauses that a chunk touches, in [0, 1]; NaN without clauses.
    chunk_count: chunks with at least one token. idiom_count: how many of them are idioms.
    """

    labels_T: Labels
    clause_T: ClauseIds
    coverage: float
    chunk_count: int
    idiom_count: int


@dataclass(frozen=True, slots=True)
class ChunkLabeller:
    """Makes pseudo-labels.

    It holds plain values only, so it can be pickled; a process loads its own word segmenter (seconds,
    some 650 MB) and lexicon when its first Chinese text comes.

    lexicon: path of an idiom list, None for the one that ships. min_chars, max_chars: bounds on the
    length of a word, in characters (idioms are exempt). min_han_frac: least share of Han characters.
    """

    lexicon: str | None = None
    min_chars: int = 2
    max_chars: int = 8
    min_han_frac: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_chars <= self.max_chars:
            raise ValueError(
                f"chunk lengths must satisfy 1 <= min_chars <= max_chars, got {self.min_chars} and {self.max_chars}"
            )
        if not 0 <= self.min_han_frac <= 1:
            raise ValueError(f"min_han_frac must be in [0, 1], got {self.min_han_frac}")

    def chunks(self, text: str) -> list[Chunk]:
        """The chunks of a text, disjoint and in order.

        Raises FileNotFoundError or ValueError when the lexicon cannot be read.
        """
        return [chunk for span in zh_spans(text) for chunk in self._chunks_within(text, *span)]

    def label(self, text: str, offsets: Offsets) -> LabelledTokens:
        """Labels for the tokens of a text, which `offsets` describes.

        Raises ValueError for offsets that are not of this text, and whatever `chunks` raises.
        """
        offsets_T2 = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if len(offsets_T2) and (offsets_T2.min() < 0 or offsets_T2.max() > len(text)):
            raise ValueError(
                f"token offsets must lie in the text of {len(text)} characters, "
                f"got {offsets_T2.min()} to {offsets_T2.max()}"
            )
        chinese = zh_spans(text)
        clauses = [clause for span in chinese for clause in clause_spans(text, *span)]
        chunks = [chunk for span in chinese for chunk in self._chunks_within(text, *span)]
        chunk_T = contained_in([chunk[:2] for chunk in chunks], offsets_T2)
        chinese_T = overlapping(chinese, offsets_T2) >= 0
        labels_T = np.full(len(offsets_T2), IGNORED_LABEL, dtype=np.int8)
        # A token without characters may stand inside a chunk and does not end it.
        solid_T = offsets_T2[:, 0] < offsets_T2[:, 1]
        labels_T[solid_T] = bios_labels(chunk_T[solid_T], chinese_T[solid_T])
        clause_T = overlapping(clauses, offsets_T2)
        kept = np.unique(chunk_T[chunk_T >= 0])
        return LabelledTokens(
            labels_T=labels_T,
            clause_T=clause_T,
            coverage=coverage_frac(labels_T, clause_T),
            chunk_count=len(kept),
            idiom_count=sum(chunks[i].idiom for i in kept),
        )

    def _chunks_within(self, text: str, start: int, end: int) -> list[Chunk]:
        """The chunks of one Chinese span."""
        words = [word for word in segment(text, start, end) if self._accepts(text, *word)]
        return override(words, load_lexicon(self.lexicon).find(text, start, end))

    def _accepts(self, text: str, start: int, end: int) -> bool:
        """Whether a word may be a chunk: its length, nothing but Han characters and digits, enough of them Han."""
        return (
            self.min_chars <= end - start <= self.max_chars
            and CLAUSE.fullmatch(text, start, end) is not None
            and han_frac(text[start:end]) >= self.min_han_frac
        )


def override(words: Spans, idioms: Spans) -> list[Chunk]:
    """All idioms and the words that overlap none, in order. Both inputs must be disjoint and in order."""
    chunks: list[Chunk] = []
    passed = 0
    for start, end in words:
        while passed < len(idioms) and idioms[passed][1] <= start:
            chunks.append(Chunk(*idioms[passed], idiom=True))
            passed += 1
        if passed == len(idioms) or idioms[passed][0] >= end:
            chunks.append(Chunk(start, end, idiom=False))
    return chunks + [Chunk(*idiom, idiom=True) for idiom in idioms[passed:]]


def overlapping(spans: Spans, offsets_T2: NDArray[np.int64]) -> NDArray[np.int32]:
    """Per token the number of the first span with which it shares a character, -1 for none.

    A token without characters is of the span that it stands inside. `spans` must be disjoint and in order.
    """
    first_T, starts_T, _ = _nearest(spans, offsets_T2)
    return np.where(starts_T < offsets_T2[:, 1], first_T, -1).astype(np.int32)


def contained_in(spans: Spans, offsets_T2: NDArray[np.int64]) -> NDArray[np.int32]:
    """Per token the number of the span that holds all its characters, -1 for none.

    A byte-level tokenizer may split a character into several tokens. Each reports the whole character,
    so each is contained where the character is. `spans` must be disjoint and in order.
    """
    first_T, starts_T, ends_T = _nearest(spans, offsets_T2)
    inside_T = (starts_T <= offsets_T2[:, 0]) & (offsets_T2[:, 1] <= ends_T)
    inside_T &= offsets_T2[:, 0] < offsets_T2[:, 1]
    return np.where(inside_T, first_T, -1).astype(np.int32)


def _nearest(
    spans: Spans, offsets_T2: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Per token the number, start and end of the first span that ends after the token's start."""
    beyond = np.iinfo(np.int64).max  # a span that no token reaches, for tokens after the last one
    bounds_N2 = np.array([*spans, (beyond, beyond)], dtype=np.int64)
    first_T = np.searchsorted(bounds_N2[:, 1], offsets_T2[:, 0], side="right")
    return first_T, bounds_N2[first_T, 0], bounds_N2[first_T, 1]


def bios_labels(chunk_T: NDArray[np.int32], chinese_T: NDArray[np.bool_]) -> Labels:
    """B I … I or S for the tokens of a chunk, O for other Chinese tokens, IGNORED_LABEL for the rest.

    chunk_T: which chunk holds a token, -1 for none.
    """
    padded = np.pad(chunk_T, 1, constant_values=-1)
    opens_T, closes_T = padded[:-2] != chunk_T, padded[2:] != chunk_T
    inside_T = np.where(opens_T, np.where(closes_T, S_LABEL, B_LABEL), I_LABEL)
    outside_T = np.where(chinese_T, O_LABEL, IGNORED_LABEL)
    return np.where(chunk_T >= 0, inside_T, outside_T).astype(np.int8)


def coverage(labels_T: Labels, clause_T: ClauseIds) -> tuple[int, int]:
    """(covered, total): the clauses that a chunk touches, and all clauses, of a run of tokens.

    ρ of a training sequence is the quotient for its slices of both arrays. A clause is a run of tokens
    with the same number, so pieces of different documents may share a sequence where a token with
    clause -1 (an end-of-text token) stands between them.
    """
    starts_T = (clause_T >= 0) & (np.concatenate(([-1], clause_T[:-1])) != clause_T)
    run_T = np.cumsum(starts_T)
    in_chunk_T = (labels_T == B_LABEL) | (labels_T == I_LABEL) | (labels_T == S_LABEL)
    covered = np.unique(run_T[in_chunk_T & (clause_T >= 0)])
    return len(covered), int(starts_T.sum())


def coverage_frac(labels_T: Labels, clause_T: ClauseIds) -> float:
    """ρ, in [0, 1], of a run of tokens; NaN where it has no clause."""
    covered, total = coverage(labels_T, clause_T)
    return covered / total if total else math.nan
