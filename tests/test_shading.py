"""Shading: pieces are whole characters, and what is seen is the text itself."""

from __future__ import annotations

import io
import re

import pytest
from rich.color import ColorSystem
from tokenizers import Tokenizer

from fbs_rl.shading import Piece, PieceJoiner, color_system, legend, shade, strip, visible
from tests.small_tokenizer import TEXTS, small_tokenizer

LAYERS = 12
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
SYSTEMS = [ColorSystem.STANDARD, ColorSystem.EIGHT_BIT, ColorSystem.TRUECOLOR]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


def join(tokenizer: Tokenizer, ids: list[int], skipped: list[int | None]) -> list[Piece]:
    joiner = PieceJoiner(tokenizer.decode)
    pieces = [joiner.push(t, s) for t, s in zip(ids, skipped, strict=True)]
    return [p for p in (*pieces, joiner.flush()) if p is not None]


@pytest.mark.parametrize("text", [*TEXTS, "naïve café 🙂🙃 龘", "a\tb\n\n  c  "])
def test_pieces_make_up_the_text_and_account_for_every_token(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text).ids
    pieces = join(tokenizer, ids, [3] * len(ids))
    assert "".join(p.text for p in pieces) == tokenizer.decode(ids) == text
    assert sum(p.tokens for p in pieces) == len(ids)


def test_a_character_of_several_tokens_is_one_piece_with_their_mean(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("龘a").ids  # never seen in training: three byte tokens
    assert len(ids) == 4
    assert join(tokenizer, ids, [2, 4, 9, 7]) == [Piece("龘", 3, 5.0), Piece("a", 1, 7.0)]
    assert join(tokenizer, ids[:3], [2, 4, None]) == [Piece("龘", 3, 3.0)]


def test_bytes_that_never_become_a_character_end_as_replacement_marks(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("b龘").ids[:-1]
    assert join(tokenizer, ids, [1, 2, None]) == [
        Piece("b", 1, 1.0),
        Piece(tokenizer.decode(ids[1:]), 2, 2.0),
    ]
    broken = [*ids, *tokenizer.encode("a").ids]
    assert "".join(p.text for p in join(tokenizer, broken, [0] * 4)) == tokenizer.decode(broken)


def test_a_piece_is_shown_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    joiner = PieceJoiner(tokenizer.decode)
    shown = [joiner.push(t, 0) for t in tokenizer.encode("x龘y").ids]
    assert [p.text if p else None for p in shown] == ["x", None, None, "龘", "y"]
    assert joiner.flush() is None


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("text", ["hello", " 读书\n\n读 ", "\n"])
def test_shading_adds_escape_codes_only(system: ColorSystem, text: str) -> None:
    shaded = shade(Piece(text, 1, 4.0), LAYERS, system)
    assert ESCAPE.sub("", shaded) == text
    assert shaded == text if text == "\n" else "\x1b[" in shaded
    # no colour is open at a line's end
    assert all(line.endswith("\x1b[0m") for line in shaded.split("\n") if line)


def test_no_colour_system_and_unfed_tokens_give_plain_text() -> None:
    assert shade(Piece("hi", 1, 4.0), LAYERS, None) == "hi"
    assert shade(Piece("hi", 1, None), LAYERS, ColorSystem.TRUECOLOR) == "hi"


def test_more_skipping_is_lighter() -> None:
    def lightness(skipped: float) -> float:
        codes = shade(Piece("x", 1, skipped), LAYERS, ColorSystem.TRUECOLOR)
        red, green, blue = map(int, re.findall(r"48;2;(\d+);(\d+);(\d+)", codes)[0])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [lightness(n) for n in range(LAYERS + 1)]
    assert shades == sorted(shades) and shades[-1] > 3 * shades[0]


def test_control_characters_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\r\x07\x9b\x7f\n\tc") == "a␛[31mb␍␇\ufffd␡\n\tc"
    assert shade(Piece("\x1b]0;title\x07", 1, 0.0), LAYERS, None) == "␛]0;title␇"


def test_strip_has_one_cell_a_layer_and_a_number_under_every_fifth() -> None:
    shares = [0.0, 0.01, 0.125, 0.126, 0.5, 0.875, 0.876, 1.0, 0.0, 0.0, 0.3, 1.0]
    cells, numbers = strip(shares).split("\n")
    assert cells == "·▁▁▂▄▇██··▃█"
    assert numbers == "0    5    10"
    for number in ("0", "5", "10"):
        assert numbers.index(number) == int(number)


def test_long_strips_wrap_and_keep_counting() -> None:
    lines = strip([0.5] * 23, width=10).split("\n")
    assert lines == ["▄" * 10, "0    5", "▄" * 10, "10   15", "▄" * 3, "20"]


def test_legend_runs_from_none_to_all_layers() -> None:
    marks = re.findall(r"\d+", ESCAPE.sub("", legend(LAYERS, ColorSystem.TRUECOLOR)))
    assert marks == ["0", "2", "4", "6", "8", "10", "12", "12"]


def test_a_file_has_no_colours() -> None:
    assert color_system(io.StringIO()) is None
