"""The idiom list that ships, lists of the user's, and the search for the longest match."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbs_rl.data.idioms import IdiomLexicon, load_lexicon

CHARS = "一心二意三言两语"


def reference_find(words: set[str], text: str) -> list[tuple[int, int]]:
    """From left to right the longest word at each place, by trying every substring."""
    spans, place = [], 0
    while place < len(text):
        ends = [end for end in range(place + 1, len(text) + 1) if text[place:end] in words]
        if ends:
            spans.append((place, ends[-1]))
        place = ends[-1] if ends else place + 1
    return spans


@given(
    words=st.sets(st.text(CHARS, min_size=2, max_size=5), min_size=1, max_size=12),
    text=st.text(CHARS + "，a", max_size=40),
)
def test_find_is_the_leftmost_longest_match(words: set[str], text: str) -> None:
    assert IdiomLexicon(words).find(text) == reference_find(words, text)


def test_the_longest_wins_and_places_are_of_the_whole_text() -> None:
    lexicon = IdiomLexicon(["一心", "一心一意", "意气"])
    assert lexicon.find("他一心一意气人") == [(1, 5)]
    assert lexicon.find("一心一意气", start=1) == [(3, 5)]
    assert lexicon.find("一心一意", end=3) == [(0, 2)]
    assert lexicon.find("") == []


def test_the_list_that_ships_is_sorted_bare_words() -> None:
    folder = files("fbs_rl.data") / "lexicon"
    lines = (folder / "idioms.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert lines == sorted(set(lines)) and len(lines) == 30714
    assert {len(word) for word in lines} == {4, 5, 6, 7, 8}
    assert load_lexicon().words == frozenset(lines)
    assert {"三心二意", "画蛇添足", "读书破万卷"} < load_lexicon().words
    licences = (folder / "LICENCES.md").read_text(encoding="utf-8")
    assert "Permission is hereby granted" in licences and "30,714" in licences


def test_a_list_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff画蛇添足\r\n\n 守株待兔 \n".encode())
    assert load_lexicon(str(path)).words == {"画蛇添足", "守株待兔"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no idiom"),
        ("画蛇添足".encode("gb18030"), "is not UTF-8"),
        ("三天打鱼，两天晒网\n".encode(), "must be two or more Han characters.*三天打鱼"),
        ("画\n".encode(), "must be two or more Han characters"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_lexicon(str(path))


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_lexicon(str(path))
