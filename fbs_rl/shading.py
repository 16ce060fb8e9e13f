"""Terminal text that shows skipping: tokens shaded by skipped layers, a legend, strips of cells, a table.

Everywhere `system` is what the terminal can colour; None gives plain text without escape codes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.color import Color, ColorSystem
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Anchors of viridis: its lightness rises evenly, so it also reads in grey and for the colour-blind."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_NEVER = "·"
_INCOMPLETE = "\ufffd"  # what decoding gives for the first bytes of a character


def color_system(stream: TextIO, no_color: bool = False) -> ColorSystem | None:
    """What `stream` can colour; None for files, pipes, NO_COLOR and dumb terminals."""
    if no_color or os.environ.get("NO_COLOR") or not stream.isatty():
        return None
    name = Console(file=stream).color_system
    return COLOR_SYSTEMS[name] if name else None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one token, or of several that share a character.

    skipped: layers skipped, mean over its tokens; None if none of them was fed.
    """

    text: str
    tokens: int
    skipped: float | None


@dataclass(slots=True)
class PieceJoiner:
    """Turns tokens into pieces of whole characters as they come; the pieces together are decode(all tokens)."""

    decode: Callable[[list[int]], str]
    # Tokens of the piece before: some decoders treat the first token of a text differently.
    _shown: list[int] = field(default_factory=list)
    _open: list[tuple[int, int | None]] = field(default_factory=list)

    def push(self, token: int, skipped: int | None) -> Piece | None:
        """The piece that `token` completes, if it completes one. skipped: layers, None if it was not fed."""
        self._open.append((token, skipped))
        text = self._new_text()
        return self._close(text) if text and not text.endswith(_INCOMPLETE) else None

    def flush(self) -> Piece | None:
        """What is still open at the end, with U+FFFD for bytes that never became a character."""
        text = self._new_text()
        return self._close(text) if text else None

    def _new_text(self) -> str:
        known = self.decode(self._shown)
        return self.decode(self._shown + [t for t, _ in self._open])[len(known) :]

    def _close(self, text: str) -> Piece:
        fed = [s for _, s in self._open if s is not None]
        piece = Piece(text, len(self._open), sum(fed) / len(fed) if fed else None)
        self._shown, self._open = [t for t, _ in self._open], []
        return piece


def visible(text: str) -> str:
    """`text` with control characters as pictures (␛), so that a model's output cannot steer the terminal."""
    return "".join(_picture(c) for c in text)


def _picture(char: str) -> str:
    code = ord(char)
    if char in "\n\t" or 32 <= code < 127 or code >= 160:
        return char
    return chr(0x2400 + code) if code < 32 else ("␡" if code == 127 else "�")


def shade(piece: Piece, layers: int, system: ColorSystem | None) -> str:
    """The piece's text on the colour of its share of skipped layers; no colour if it was never fed."""
    if system is None or piece.skipped is None:
        return visible(piece.text)
    share = piece.skipped / layers
    # Line ends stay outside, or the colour would run to the terminal's edge.
    return "\n".join(_on_colour(x, share, system) for x in visible(piece.text).split("\n"))


def legend(layers: int, system: ColorSystem) -> str:
    """One line that says which colour means how many skipped layers."""
    marks = [round(layers * i / 6) for i in range(7)]
    cells = (_on_colour(f" {mark} ", mark / layers, system) for mark in marks)
    return f"layers skipped {''.join(cells)} of {layers}; the last token is not fed, so it has no colour"


def strip(shares: Sequence[float], every: int = 5, width: int = 60) -> str:
    """One cell for each share in [0, 1], `width` to a line, with numbers from 0 under every fifth cell."""
    lines = []
    for start in range(0, len(shares), width):
        part = shares[start : start + width]
        lines.append("".join(_cell(share) for share in part))
        numbers = range(start, start + len(part), every)
        lines.append("".join(str(n).ljust(every) for n in numbers).rstrip())
    return "\n".join(lines)


def strip_key() -> str:
    """What the cells of a strip mean."""
    steps = f"{_BLOCKS[0]} up to 1/8, {_BLOCKS[3]} up to 1/2, {_BLOCKS[7]} above 7/8"
    return f"{_NEVER} none, {steps}"


def _cell(share: float) -> str:
    return _BLOCKS[min(math.ceil(share * 8), 8) - 1] if share > 0 else _NEVER


def _on_colour(text: str, share: float, system: ColorSystem) -> str:
    # A Style remembers the codes of the first system it was rendered for, so none is kept.
    style = Style(color="bright_white" if share < 0.45 else "black", bgcolor=_colour(share))
    return style.render(text, color_system=system)


def _colour(share: float) -> Color:
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(at), len(_RAMP) - 2)
    mix = (a + (b - a) * (at - low) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return Color.from_rgb(*(round(part) for part in mix))
