"""Rules that look at one document alone: normal form, length, language, source."""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum
from fnmatch import fnmatchcase

from fbs_rl.data.prepare_config import FilterConfig
from fbs_rl.data.script_spans import HAN, document_language


class Removal(StrEnum):
    """Why a document is not in the shards, in the order in which the reasons are looked for."""

    SOURCE = "excluded source"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    LANGUAGE = "language"
    CONTAMINATED = "shares text with a benchmark"
    EXACT_DUPLICATE = "exact duplicate"
    NEAR_DUPLICATE = "near duplicate"


# Control characters other than tab and line feed, the byte order mark, and code points that are no characters.
_UNWANTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]")


def normalise(text: str) -> str:
    """The text in NFC with plain line ends, no control characters, no white space around it."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNWANTED.sub("", unicodedata.normalize("NFC", text)).strip()


def first_objection(text: str, source: str, config: FilterConfig) -> tuple[Removal | None, str]:
    """The first rule that a normalised document breaks, or None; and its language ("" if not looked at)."""
    if any(fnmatchcase(source, pattern) for pattern in config.exclude_sources):
        return Removal.SOURCE, ""
    if len(text) < config.min_chars:
        return Removal.TOO_SHORT, ""
    if len(text) > config.max_chars:
        return Removal.TOO_LONG, ""
    # Two quick looks settle most texts; counting letters takes ten times as long.
    no_han = text.isascii() or HAN.search(text) is None
    language = "en" if no_han else document_language(text)
    return (None if language in config.languages else Removal.LANGUAGE), language
