"""Which characters of a text are Chinese, and where its clauses are.

All positions are Python string indices; spans are half-open.

Limit: script, not language. The Han characters of a Japanese text count as Chinese; its kana do not.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ZH, OTHER = "zh", "other"

# Unified ideographs with all extensions, compatibility ideographs, and the two signs that stand for
# one: the repetition mark and the zero.
_HAN = (
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ebef\U0002ebf0-\U0002ee5f"
    "\U0002f800-\U0002fa1f\U00030000-\U000323af"
)
# Numbers that Unicode does not call decimal digits, so that `\d` does not find them: ², ①, ㈠, ㊀.
_NUMBER = "\u00b2\u00b3\u00b9\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u3220-\u3229\u3280-\u3289"
_ZH_PUNCTUATION = frozenset(
    "“”‘’…—·・"
    + "".join(map(chr, (*range(0x3001, 0x3005), *range(0x3008, 0x3020), 0x303D)))
    + "".join(map(chr, (*range(0xFE30, 0xFE50), *range(0xFF01, 0xFF10), *range(0xFF1A, 0xFF21))))
    + "".join(map(chr, (*range(0xFF3B, 0xFF41), *range(0xFF5B, 0xFF66))))
)

HAN = re.compile(f"[{_HAN}]")
HAN_RUN = re.compile(f"[{_HAN}]+")
# From one Han character to the last one that is reached without a letter of another script.
_ZH_RUN = re.compile(f"[{_HAN}](?:[{_HAN}{_NUMBER}\\W\\d_]*[{_HAN}])?")
CLAUSE = re.compile(f"[{_HAN}{_NUMBER}\\d]+")
_LETTER = re.compile(r"[^\W\d_]")

_ENGLISH_MAX_HAN_FRAC = 0.05
_CHINESE_MIN_HAN_FRAC = 0.5


class Span(NamedTuple):
    """Characters [start, end) of a text, in ZH or OTHER script."""

    start: int
    end: int
    lang: str


def script_spans(text: str) -> list[Span]:
    """The text as alternating Chinese and other spans that join up to the whole of it.

    A Chinese span starts and ends with a Han character or Chinese punctuation that touches one. What
    stands between two Han characters and belongs to no script (digits, punctuation, white space,
    symbols) is inside; a letter of another script ends the span.
    """
    spans: list[Span] = []
    done = 0
    for start, end in zh_spans(text):
        if start > done:
            spans.append(Span(done, start, OTHER))
        spans.append(Span(start, end, ZH))
        done = end
    if done < len(text):
        spans.append(Span(done, len(text), OTHER))
    return spans


def zh_spans(text: str) -> list[tuple[int, int]]:
    """The Chinese spans of `script_spans` only."""
    spans: list[tuple[int, int]] = []
    done = 0
    for found in _ZH_RUN.finditer(text):
        start, end = found.span()
        while start > done and text[start - 1] in _ZH_PUNCTUATION:
            start -= 1
        while end < len(text) and text[end] in _ZH_PUNCTUATION:
            end += 1
        spans.append((start, end))
        done = end
    return spans


def clause_spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Maximal runs of Han characters and digits in text[start:end] that hold a Han character.

    Whatever is neither (punctuation, white space, symbols) ends a clause.
    """
    return [
        found.span() for found in CLAUSE.finditer(text, start, end) if HAN.search(found.group())
    ]


def han_frac(text: str) -> float:
    """Share of Han characters among all characters, 0 for an empty text."""
    return sum(map(len, HAN_RUN.findall(text))) / len(text) if text else 0.0


def document_language(text: str) -> str:
    """ "zh" if at least half of the letters are Han, "en" if at most 5 % are (or there are none), else "mixed"."""
    letters = len(_LETTER.findall(text))
    if letters == 0:
        return "en"
    share = sum(map(len, HAN_RUN.findall(text))) / letters
    if share >= _CHINESE_MIN_HAN_FRAC:
        return "zh"
    return "en" if share <= _ENGLISH_MAX_HAN_FRAC else "mixed"
