"""Whether a growing text stands inside brackets, a quotation, JSON or code, known after every character.

One pass, constant work a character, nothing is read twice; the rules are listed in docs/safety.md. Every open
structure has a place by which it ends whatever follows, so a mark that is never closed protects little.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Structure(StrEnum):
    BRACKET = "bracket"
    QUOTE = "quote"
    JSON = "json"
    CODE = "code"  # fenced, or between single backticks


LIMIT_CHARS = {
    Structure.BRACKET: 1000,
    Structure.QUOTE: 400,
    Structure.JSON: 16_000,
    Structure.CODE: 32_000,
}
"""How long a structure can stay open. The end of a paragraph closes brackets and quotations sooner."""
SHORT_LIMIT_CHARS = 120
"""Of a quotation between ' and ', which may be an apostrophe."""
DEPTH = 64
"""Structures inside each other; further ones are not opened."""

BRACKETS = dict(zip("([{（［｛【〔《〈", ")]}）］｝】〕》〉", strict=True))
QUOTES = dict(zip("“‘「『«", "”’」』»", strict=True))
_CLOSERS = frozenset([*BRACKETS.values(), *QUOTES.values()]) - {"’"}
_BLANK = frozenset(" \t\r\n\u3000")
_STOPS = frozenset(".,;:!?…%)]}")
_FENCE_MARKS = 3


def is_latin(char: str) -> bool:
    """A letter or digit of a script that writes apostrophes and puts spaces around quotations."""
    return char.isalnum() and char < "\u2e80"


@dataclass(slots=True)
class _Open:
    """One open structure. ends_at: the character count by which it ends, never after that of the one around it."""

    kind: Structure
    closer: str
    ends_at: int
    literal: bool = False  # inside, only the closer means anything


@dataclass(slots=True)
class _Fence:
    """An open code fence. in_info: its first line, which may name the language, is not over."""

    mark: str
    length: int
    ends_at: int
    in_info: bool = True


class _Line:
    """What a line has been so far, as far as fences and paragraphs are concerned."""

    INDENT, MARKS, TAIL, TEXT = range(
        4
    )  # blank; then fence marks; then blanks again; anything else


@dataclass(slots=True)
class StructureState:
    """Feed it text in pieces of any size; `kind` is the innermost structure that is open now."""

    chars: int = 0
    _open: list[_Open] = field(default_factory=list)
    _fence: _Fence | None = None
    _line: int = _Line.INDENT
    _mark: str = ""
    _marks: int = 0
    _escaped: bool = False
    _doubt: str = ""  # "'" or "’" that the next character will show to be an end or an apostrophe
    _fresh: bool = False  # a "'" that the next character may show to be an apostrophe
    _last: str = ""
    _solid: str = ""  # the last character that is not blank

    @property
    def kind(self) -> Structure | None:
        """None in plain prose."""
        if self._fence is not None:
            return Structure.CODE
        return self._open[-1].kind if self._open else None

    def push(self, text: str) -> None:
        """Go on with the next piece of the text."""
        for char in text:
            self._step(char)

    def _step(self, char: str) -> None:
        self.chars += 1
        self._expire()
        self._settle(char)
        if char != "\n":
            self._read_line(char)
        if self._fence is not None:
            self._in_fence(self._fence, char)
        elif char == "\n":
            self._end_line()
        else:
            self._in_text(char)
        if char == "\n":
            self._line, self._marks = _Line.INDENT, 0
        self._last = char
        if char not in _BLANK:
            self._solid = char

    def _expire(self) -> None:
        if self._fence is not None and self.chars > self._fence.ends_at:
            self._fence = None
        while self._open and self.chars > self._open[-1].ends_at:
            self._open.pop()
            self._escaped = False

    def _settle(self, char: str) -> None:
        """Decide about an apostrophe that waited for the character after it."""
        doubt, fresh, self._doubt, self._fresh = self._doubt, self._fresh, "", False
        if doubt and not is_latin(char):
            self._close(doubt)
        if fresh and (char in _BLANK or char.isdigit()) and self._open and self._top.closer == "'":
            self._open.pop()

    def _read_line(self, char: str) -> None:
        line = self._line
        if line == _Line.INDENT and char in "`~":
            self._line, self._mark, self._marks = _Line.MARKS, char, 1
        elif line == _Line.MARKS and char == self._mark:
            self._marks += 1
        elif char not in _BLANK:
            self._line = _Line.TEXT
        elif line == _Line.MARKS:
            self._line = _Line.TAIL

    # --- code ---------------------------------------------------------------------------------------

    def _in_fence(self, fence: _Fence, char: str) -> None:
        if char == "\n":
            shuts = self._line in (_Line.MARKS, _Line.TAIL) and self._mark == fence.mark
            if not fence.in_info and shuts and self._marks >= fence.length:
                self._fence = None
            fence.in_info = False
        elif fence.in_info and self._line == _Line.MARKS:
            fence.length = self._marks
        elif fence.in_info and char == "`" == fence.mark:
            self._fence = None  # ```like this``` is code within a line

    # --- prose and JSON -----------------------------------------------------------------------------

    @property
    def _top(self) -> _Open:
        return self._open[-1]

    def _end_line(self) -> None:
        if self._open and self._top.literal:
            broken = self._open.pop().kind is Structure.JSON
            self._escaped = False
            if broken:
                self._demote_json()
        if self._line == _Line.INDENT:  # a paragraph ends
            self._open = [x for x in self._open if x.kind is Structure.JSON]

    def _demote_json(self) -> None:
        """A string over the end of a line is no JSON: what was taken for it ends as brackets do."""
        limit = self.chars + LIMIT_CHARS[Structure.BRACKET]
        for item in self._open:
            if item.kind is Structure.JSON:
                item.kind = Structure.BRACKET
            item.ends_at = min(item.ends_at, limit)

    def _in_text(self, char: str) -> None:
        if self._line == _Line.MARKS and self._marks == _FENCE_MARKS:
            self._open = []  # a fence ends the paragraph before it
            self._escaped = False
            self._fence = _Fence(char, _FENCE_MARKS, self.chars + LIMIT_CHARS[Structure.CODE])
        elif self._open and self._top.literal:
            self._in_literal(self._top, char)
        elif char == '"':
            self._straight_double()
        elif char == "'":
            self._straight_single()
        elif char == "`":
            self._push(Structure.CODE, "`", LIMIT_CHARS[Structure.QUOTE], literal=True)
        elif char == "’":
            self._doubt = "’"
        elif char in BRACKETS:
            inside_json = bool(self._open) and self._top.kind is Structure.JSON and char in "[{"
            kind = Structure.JSON if inside_json else Structure.BRACKET
            self._push(kind, BRACKETS[char], LIMIT_CHARS[kind])
        elif char in QUOTES:
            self._push(Structure.QUOTE, QUOTES[char], LIMIT_CHARS[Structure.QUOTE])
        elif char in _CLOSERS:
            self._close(char)

    def _in_literal(self, literal: _Open, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\" and literal.kind is Structure.JSON:
            self._escaped = True
        elif char == literal.closer:
            self._open.pop()

    def _straight_double(self) -> None:
        # In { or [, a " where JSON has its strings begins one, and shows the bracket to be JSON.
        if self._open and self._top.closer in "]}":
            starts = self._solid in "{[,:"
            if starts or self._top.kind is Structure.JSON:
                self._promote_json()
                self._push(Structure.JSON, '"', LIMIT_CHARS[Structure.JSON], literal=True)
                return
        if not self._close('"') and self._may_open():
            self._push(Structure.QUOTE, '"', LIMIT_CHARS[Structure.QUOTE])

    def _promote_json(self) -> None:
        start = len(self._open)
        while start and self._open[start - 1].closer in "]}":
            start -= 1
        limit = self.chars + LIMIT_CHARS[Structure.JSON]
        around = self._open[start - 1].ends_at if start else limit
        for item in self._open[start:]:
            if item.kind is not Structure.JSON:
                item.kind, item.ends_at = Structure.JSON, min(limit, around)
            around = item.ends_at

    def _straight_single(self) -> None:
        if self._last and self._last not in _BLANK and any(x.closer == "'" for x in self._open):
            self._doubt = "'"
        elif self._may_open():
            self._fresh = self._push(Structure.QUOTE, "'", SHORT_LIMIT_CHARS)

    def _may_open(self) -> bool:
        """Whether a straight quote here can begin a quotation: not after a word, a number or a stop."""
        return not (is_latin(self._last) or self._last in _STOPS)

    def _push(self, kind: Structure, closer: str, limit: int, literal: bool = False) -> bool:
        if len(self._open) == DEPTH:
            return False
        ends_at = self.chars + limit
        if self._open:
            ends_at = min(ends_at, self._top.ends_at)
        self._open.append(_Open(kind, closer, ends_at, literal))
        return True

    def _close(self, closer: str) -> bool:
        """End the nearest structure that `closer` ends, and what was left open in it; False if there is none."""
        for i in range(len(self._open) - 1, -1, -1):
            if self._open[i].closer == closer:
                del self._open[i:]
                return True
        return False
