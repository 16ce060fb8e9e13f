"""Texts as sequences of hashed units, and the hashes of their n-grams.

A unit is a word (a run of letters and digits, lower-cased) or one character of a script that is written
without spaces (Han, kana). Punctuation and white space count for nothing. All hashes are 64 bits, the same
on every machine, and computed on whole arrays: a Python loop over words would cost ten times as much.

Limit: a run of Thai, Khmer or Burmese letters is one word.
"""

from __future__ import annotations

import functools

import numpy as np

_SEPARATOR, _WORD, _SINGLE = 0, 1, 2
_SINGLE_RANGES = (
    (0x3005, 0x3007), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
    (0x20000, 0x2FA1F), (0x30000, 0x323AF),
)  # fmt: skip
_PIECE_CHARS = 2**19
"""Texts are hashed in pieces, which bounds the memory; a word across a cut counts as two."""
_PLACE, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def unit_hashes(text: str) -> np.ndarray:
    """uint64, one a unit, in order."""
    pieces = [
        _unit_hashes(text[start : start + _PIECE_CHARS])
        for start in range(0, len(text), _PIECE_CHARS)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)


def _unit_hashes(text: str) -> np.ndarray:
    code = np.frombuffer(text.lower().encode("utf-32-le"), np.uint32)
    kind = _kinds()[code]
    inside = kind != _SEPARATOR
    if not inside.any():
        return np.zeros(0, np.uint64)
    follows_word = np.append(False, kind[:-1] == _WORD)
    opens = (inside & ~((kind == _WORD) & follows_word))[inside]
    first = np.flatnonzero(opens)
    sizes = np.diff(np.append(first, len(opens)))
    place = np.arange(len(opens)) - np.repeat(first, sizes)
    hashed = mix(code[inside].astype(np.uint64) + place.astype(np.uint64) * _PLACE)
    return mix(np.add.reduceat(hashed, first))


def ngram_hashes(units: np.ndarray, size: int) -> np.ndarray:
    """uint64, one for each run of `size` units; a shorter text is one run; none of no units."""
    size = min(size, len(units))
    if size == 0:
        return np.zeros(0, np.uint64)
    count = len(units) - size + 1
    combined = units[:count].copy()
    for offset in range(1, size):
        combined *= _STEP
        combined += units[offset : offset + count]
    return mix(combined)


def mix(value: np.ndarray) -> np.ndarray:
    """The last step of SplitMix64: every bit of the input changes half of the output's."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@functools.lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """uint8 kind of every code point; a tenth of a second to make."""
    points = range(0x110000)
    kinds = np.fromiter((chr(point).isalnum() for point in points), np.uint8, len(points))
    for first, last in _SINGLE_RANGES:
        kinds[first : last + 1] *= _SINGLE
    return kinds
