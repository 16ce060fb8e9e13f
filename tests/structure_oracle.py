"""A slow second writing of docs/safety.md's rules: reads a whole text again for every question.

It works by lines and looks ahead where the tracker waits; it leaves out only the limit of code fences.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLANK = " \t\r\n\u3000"
ROUND = {
    "(": ")",
    "[": "]",
    "{": "}",
    "（": "）",
    "［": "］",
    "｛": "｝",
    "【": "】",
    "〔": "〕",
} | {
    "《": "》",
    "〈": "〉",
}
QUOTING = {"“": "”", "‘": "’", "「": "」", "『": "』", "«": "»"}
FENCE_LINE = re.compile(r"[ \t\r\u3000]*(`{3,}|~{3,})(.*)", re.DOTALL)


@dataclass
class Item:
    kind: str
    closer: str
    end: int
    literal: bool = False


def word(char: str) -> bool:
    return char.isalnum() and ord(char) < 0x2E80


class Reader:
    """The structures of one text, found in one reading."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.items: list[Item] = []
        self.fence = ""
        start = 0
        lines = text.split("\n")
        for number, line in enumerate(lines):
            self.read_line(line, start, number < len(lines) - 1)
            start += len(line) + 1

    def answer(self) -> str | None:
        if self.fence:
            return "code"
        return self.items[-1].kind if self.items else None

    def read_line(self, line: str, start: int, complete: bool) -> None:
        if self.fence:
            shut = re.fullmatch(r"[ \t\r\u3000]*(`{3,}|~{3,})[ \t\r\u3000]*", line)
            if complete and shut and shut[1].startswith(self.fence):
                self.fence = ""
            return
        begin, found = 0, FENCE_LINE.fullmatch(line)
        if found:
            self.items = []
            if "`" not in found[2] or found[1][0] == "~":
                self.fence = found[1]
                return
            begin = line.index("`", found.end(1)) + 1
        for place in range(start + begin, start + len(line)):
            self.read_char(place)
        if complete:
            self.end_line(start + len(line), line)

    def end_line(self, place: int, line: str) -> None:
        self.drop_old(place + 1)
        if self.items and self.items[-1].literal and self.items.pop().kind == "json":
            for item in self.items:
                item.kind = "bracket" if item.kind == "json" else item.kind
                item.end = min(item.end, place + 1 + 1000)
        if not line.strip(BLANK):
            self.items = [item for item in self.items if item.kind == "json"]

    def drop_old(self, chars: int) -> None:
        for i, item in enumerate(self.items):
            if chars > item.end:
                del self.items[i:]
                return

    def add(self, place: int, kind: str, closer: str, limit: int, literal: bool = False) -> None:
        if len(self.items) < 64:
            self.items.append(Item(kind, closer, place + 1 + limit, literal))

    def end(self, closer: str) -> bool:
        places = [i for i, item in enumerate(self.items) if item.closer == closer]
        if places:
            del self.items[places[-1] :]
        return bool(places)

    def read_char(self, place: int) -> None:
        self.drop_old(place + 1)
        char, before = self.text[place], self.text[place - 1 : place] if place else ""
        after = self.text[place + 1 : place + 2]
        if self.items and self.items[-1].literal:
            item = self.items[-1]
            if char == item.closer and not (item.kind == "json" and self.escaped(place)):
                self.items.pop()
            return
        opens = not (word(before) or before in tuple(".,;:!?…%)]}"))
        if char == '"':
            self.double_quote(place, opens)
        elif (
            char == "'"
            and before
            and before not in BLANK
            and any(i.closer == "'" for i in self.items)
        ):
            if after and not word(after):
                self.end("'")
        elif char == "'":
            if opens and not (after and (after in BLANK or after.isdigit())):
                self.add(place, "quote", "'", 120)
        elif char == "’":
            if after and not word(after):
                self.end("’")
        elif char == "`":
            self.add(place, "code", "`", 400, True)
        elif char in ROUND:
            inside = bool(self.items) and self.items[-1].kind == "json" and char in "{["
            self.add(
                place,
                *(("json", ROUND[char], 16_000) if inside else ("bracket", ROUND[char], 1000)),
            )
        elif char in QUOTING:
            self.add(place, "quote", QUOTING[char], 400)
        else:
            self.end(char)

    def escaped(self, place: int) -> bool:
        """Behind an odd number of backslashes; a string begins after a quote, so none is counted too many."""
        slashes = re.search(r"\\*\Z", self.text[:place])
        return slashes is not None and len(slashes[0]) % 2 == 1

    def double_quote(self, place: int, opens: bool) -> None:
        before = self.text[:place].rstrip(BLANK)[-1:]
        inside = bool(self.items) and self.items[-1].closer in ("]", "}")
        if inside and (self.items[-1].kind == "json" or before in ("{", "[", ",", ":")):
            for item in reversed(self.items):
                if item.closer not in ("]", "}"):
                    break
                if item.kind != "json":
                    item.kind, item.end = "json", place + 1 + 16_000
            self.add(place, "json", '"', 16_000, True)
        elif not self.end('"') and opens:
            self.add(place, "quote", '"', 400)


def structure_of(text: str) -> str | None:
    """What `text` ends inside of."""
    return Reader(text).answer()
