"""What a growing text stands inside of, character by character and token by token."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fbs_rl.decode.safety import TokenText
from fbs_rl.decode.structure import LIMIT_CHARS, Structure, StructureState
from tests.small_tokenizer import small_tokenizer
from tests.structure_oracle import structure_of


def kinds(text: str) -> list[str | None]:
    """The kind after each character."""
    state, found = StructureState(), []
    for char in text:
        state.push(char)
        found.append(state.kind)
    return found


# A text, and what is open after each of its characters: nothing (.) or a kind, by its first letter.
CASES = {
    "apostrophes": ("don't it's dogs' rock", "....................."),
    "a quotation with an apostrophe": ("say 'I don't' ok", "....qqqqqqqqq..."),
    "a year": ("the '90s", "....q..."),
    "double": ('he said "hi" ok', "........qqq...."),
    "inches": ('a 5" disk', "........."),
    "curly": ("“a ‘b’ don’t” c", "qqqqqqqqqqqq..."),
    "chinese": ("他说：「好『是』」（对）《书》", "...qqqqq.bb.bb."),
    "chinese around straight": ('他说"你好"吗', "..qqq.."),
    "nested": ("f(a[1]{2})x", ".bbbbbbbb.."),
    "crossed brackets": ("(a]b)c", "bbbb.."),
    "unclosed inside": ("([a)b", "bbb.."),
    "list marks and a smiley": ("1) a\n2) b ;)", "............"),
    "json": ('{"a": "x}"}.', "bjjjjjjjjj.."),
    "json escapes": (r'{"a":"\"}"}.', "bjjjjjjjjj.."),
    "json with blanks": ('{ \n"a": "}"}.', "bbbjjjjjjjj.."),
    "json array": ('[1, ["a"]] b', "bbbbbjjjj..."),
    "not json": ("[he] {x} b", "bbb..bb..."),
    "paragraph": ('a "b\n\nc (d\n \ne', "..qqq...bbbb.."),
    "json over a paragraph": ('{"a":\n\n1}.', "bjjjjjjj.."),
    "a string over a line": ('{"a\n"b\n\nc', "bjjbqqq.."),
    "inline code": ("a `(` b `c\nd", "..cc....cc.."),
    "a backslash in inline code": ("`a\\` b", "ccc..."),
    "fence": ("```py\n(\n```\nx", "c.ccccccccc.."),
    "tildes": ("~~~\n```\n~~~\nx", "..ccccccccc.."),
    "longer fence": ("````\n```\n````\nx", "c.ccccccccccc.."),
    "no fence": ("```a``` (b", "c.cc.c..bb"),
    "a fence in a list": ("- (a\n  ```\n'\n  ```\nb", "..bbbbbcbccccccccc.."),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases_written_by_hand(name: str) -> None:
    text, wanted = CASES[name]
    found = "".join("." if kind is None else kind[0] for kind in kinds(text))
    assert found == wanted


PIECES = [
    *"()[]{}\"'`~\\,:.5 \n（）「」『』《》“”‘’«»é字🙂",
    "\n\n", "\n \n", "```", "~~~", "\n```", "\n```py\n", "\n````\n", "\n ```\n", "don't", "'s ", " 'a", "word ",
    '{"', '": "', '"}', '\\"', '["', '", ', "[1, ", "\r\n", "读书", "x" * 130, "y" * 420, "z" * 1010, "(" * 70,
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.data())
@example("(" * 64 + "\"'`」", None)
def test_the_tracker_agrees_with_a_scanner_of_whole_prefixes(
    text: str, data: st.DataObject | None
) -> None:
    state, place = StructureState(), 0
    while place < len(text):
        size = 1 if data is None else data.draw(st.integers(1, 9))
        state.push(text[place : place + size])
        place = min(place + size, len(text))
        assert state.kind == structure_of(text[:place]), text[:place]


@settings(max_examples=20, deadline=None)
@given(st.text(st.sampled_from("([{\"'`“「a \n,:~\\"), max_size=60))
def test_nothing_stays_open_for_ever(text: str) -> None:
    state = StructureState()
    state.push(text + "\nx ")
    state.push("word " * (max(LIMIT_CHARS.values()) // 5 + 1))
    assert state.kind is None


def test_each_limit() -> None:
    openings = {Structure.QUOTE: '"', Structure.BRACKET: "(", Structure.CODE: "```"}
    for kind, opening in (*openings.items(), (Structure.JSON, '{"')):
        state = StructureState()
        state.push(opening + "a" * LIMIT_CHARS[kind])
        assert state.kind is kind
        state.push("a")
        assert state.kind is None


def test_a_structure_ends_with_the_one_around_it() -> None:
    state = StructureState()
    state.push('"' + "a" * 300 + " (" + "a" * 90)
    assert state.kind is Structure.BRACKET
    state.push("a" * 20)
    assert state.kind is None


def test_strings_do_not_prolong_the_json_around_them() -> None:
    state, pair = StructureState(), '"a": 1, '
    state.push("{" + pair * (LIMIT_CHARS[Structure.JSON] // len(pair) - 1))
    assert state.kind is Structure.JSON
    state.push(pair * 3 + " ")
    assert state.kind is None


def test_work_a_character_does_not_grow_with_the_text() -> None:
    """Twenty thousand characters cost about ten times two thousand; a second reading would cost a hundred."""
    draw = random.Random(1)
    text = "".join(draw.choices(PIECES[:-4], k=40_000))

    def seconds(chars: int) -> float:
        best = 1e9
        for _ in range(3):
            state, start = StructureState(), time.perf_counter()
            state.push(text[:chars])
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(20_000) < 40 * seconds(2_000)


TOKENIZER = small_tokenizer()


def read(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("abc読书🙂é「」“”{}\"' \n"), max_size=40))
def test_tokens_that_split_characters_give_the_text_as_soon_as_it_is_whole(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    made, so_far = TokenText(read), ""
    for i, token in enumerate(ids):
        so_far += made.push(token)
        assert so_far == read(ids[: i + 1]).rstrip("\ufffd")
        assert len(made.window) <= 16
    assert so_far == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=60))
def test_tokens_that_are_no_text_lose_nothing_but_their_bad_bytes(ids: list[int]) -> None:
    made = TokenText(read)
    text = "".join(made.push(token) for token in ids)
    whole = read(ids)
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_a_window_begins_with_the_prompts_tokens() -> None:
    prompt, more = TOKENIZER.encode("读书 and").ids, TOKENIZER.encode(" 「skip」").ids
    made = TokenText(read, prompt)
    assert "".join(made.push(token) for token in more) == " 「skip」"
