"""Chunk pseudo-labels: hand-made examples, and a token-by-token reference on random texts."""

from __future__ import annotations

import functools
import math
import pickle
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fbs_rl.data.chunk_labels import (
    Chunk,
    ChunkLabeller,
    LabelledTokens,
    bios_labels,
    contained_in,
    coverage,
    coverage_frac,
    overlapping,
    override,
)
from fbs_rl.data.samples import load_sample
from fbs_rl.data.script_spans import document_language, script_spans, zh_spans
from fbs_rl.data.segmentation_score import main
from fbs_rl.data.segmenter import load_segmenter
from fbs_rl.model.backbone import ModelSource
from fbs_rl.types import IGNORED_LABEL
from tests.small_tokenizer import saveable_tokenizer

ODD = "我们在北京大学读书破万卷三心二意。，“”、0１９年①%…·. \n\u3000\x1c\x00abéЖか😀𠀀〇々e\u0301"
LABELLER = ChunkLabeller()
SURROGATES, UNASSIGNED = (
    "Cs",
    "Cn",
)  # no tokenizer takes the former; names are unknown of the latter


def any_text(max_size: int, without: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """Unicode of all kinds but the categories `without`, with what matters here overweighted."""
    anything = st.characters(exclude_categories=without)  # pyright: ignore[reportArgumentType]
    return st.text(st.one_of(st.sampled_from(ODD), anything), max_size=max_size)


@functools.lru_cache
def tokenizer(size: int) -> PreTrainedTokenizerFast:
    return saveable_tokenizer(size=size)


def offsets_of(text: str, made: Any) -> list[tuple[int, int]]:
    return made(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping


def label_chars(text: str) -> tuple[str, list[int], LabelledTokens]:
    """Labels as letters ("-": ignored) and clauses, with one token for each character."""
    made = LABELLER.label(text, [(i, i + 1) for i in range(len(text))])
    letters = "".join("-" if label == IGNORED_LABEL else "BIOS"[label] for label in made.labels_T)
    return letters, made.clause_T.tolist(), made


def is_han(char: str) -> bool:
    name = unicodedata.name(char, "")
    return name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO")) or char in "〇々"


def reference_labels(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """The definition, token by token: a chunk is B I … I or S over the tokens it wholly contains."""
    chinese = {place for span in zh_spans(text) for place in range(*span)}
    labels = [2 if set(range(*token)) & chinese else IGNORED_LABEL for token in offsets]
    for start, end, _ in LABELLER.chunks(text):
        inside = [t for t, (a, b) in enumerate(offsets) if a < b and start <= a and b <= end]
        for t in inside:
            labels[t] = 1
        if inside:
            labels[inside[0]] = 0 if len(inside) > 1 else 3
    return labels


def reference_coverage(labels: list[int], clauses: list[int]) -> tuple[int, int]:
    wanted = {clause for clause in clauses if clause >= 0}
    touched = {c for label, c in zip(labels, clauses, strict=True) if label in (0, 1, 3)}
    return len(wanted & touched), len(wanted)


# ---- script


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("plain text, 3.5 %", ["plain text, 3.5 %"]),
        ("你好", ["你好"]),
        ("use 深度学习 and Python3。", ["use ", "深度学习", " and Python3。"]),
        ("“你好，”他说。 OK", ["“你好，”他说。", " OK"]),
        ("在2020年 3.5% 的 GDP", ["在2020年 3.5% 的", " GDP"]),
        ("2020年", ["2020", "年"]),
        ("日本のアニメ", ["日本", "のアニメ"]),
        ("①点②点", ["①", "点②点"]),
        ("你😀好\n\n我", ["你😀好\n\n我"]),
        ("你？a！我", ["你？", "a", "！我"]),
    ],
)
def test_script_spans(text: str, pieces: list[str]) -> None:
    assert [text[start:end] for start, end, _ in script_spans(text)] == pieces


@settings(max_examples=500)
@given(any_text(60, without=(UNASSIGNED,)))
def test_spans_tile_the_text_and_hold_the_han_characters(text: str) -> None:
    spans = script_spans(text)
    assert "".join(text[span.start : span.end] for span in spans) == text
    assert all(a.lang != b.lang or a.lang == "zh" for a, b in pairwise(spans))
    for start, end, lang in spans:
        inside = text[start:end]
        if lang == "zh":
            assert any(map(is_han, inside))
            assert not any(char.isalpha() and not is_han(char) for char in inside)
        else:
            assert inside and not any(map(is_han, inside))


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("", "en"),
        ("123 !", "en"),
        ("hello 好", "mixed"),
        ("你好 ok", "zh"),
        ("a" * 99 + "好", "en"),
    ],
)
def test_document_language(text: str, lang: str) -> None:
    assert document_language(text) == lang


def test_samples_are_in_their_language() -> None:
    for lang in ("en", "zh"):
        assert {document_language(document.text) for document in load_sample(lang, "train")} == {
            lang
        }


# ---- chunks


def test_an_idiom_overrides_the_words_it_overlaps() -> None:
    words, idioms = [(0, 1), (1, 3), (3, 5), (5, 7), (8, 10)], [(2, 6), (10, 14)]
    assert override(words, idioms) == [
        Chunk(0, 1, False),
        Chunk(2, 6, True),
        Chunk(8, 10, False),
        Chunk(10, 14, True),
    ]
    assert override([], []) == [] and override([], [(0, 4)]) == [Chunk(0, 4, True)]
    assert override([(0, 2), (2, 4)], [(1, 3)]) == [Chunk(1, 3, True)]


def test_chunks_of_a_sentence() -> None:
    text = "他三心二意地读书，hello 北京大学2020年的学生有3.5％在3月来。"
    found = [(text[start:end], idiom) for start, end, idiom in LABELLER.chunks(text)]
    assert ("三心二意", True) in found and ("读书", False) in found and ("学生", False) in found
    words = {word for word, _ in found}
    assert "3月" in words  # half of it is Han
    assert not words & {"他", "地", "2020年", "3.5％", "hello"}


def test_the_bounds_are_the_users() -> None:
    text = "我们在图书馆讨论了３月的问题，这样一往情深"
    for labeller in (ChunkLabeller(min_chars=3), ChunkLabeller(max_chars=2)):
        words = [chunk for chunk in labeller.chunks(text) if not chunk.idiom]
        lengths = {end - start for start, end, _ in words}
        assert words and lengths <= set(range(labeller.min_chars, labeller.max_chars + 1))
        assert len(labeller.chunks(text)) == len(words) + 1  # idioms are exempt
    strict = [text[a:b] for a, b, _ in ChunkLabeller(min_han_frac=1).chunks(text)]
    assert "３月" not in strict and "３月" in [text[a:b] for a, b, _ in LABELLER.chunks(text)]


@pytest.mark.parametrize(
    "bounds", [{"min_chars": 0}, {"min_chars": 5, "max_chars": 4}, {"min_han_frac": 1.5}]
)
def test_impossible_bounds_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        ChunkLabeller(**bounds)


def test_another_lexicon(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("学读\n", encoding="utf-8")
    text = "大学读书"
    assert Chunk(1, 3, True) in ChunkLabeller(lexicon=str(path)).chunks(text)
    assert not any(chunk.idiom for chunk in LABELLER.chunks(text))
    with pytest.raises(FileNotFoundError, match="idiom list"):
        ChunkLabeller(lexicon=str(tmp_path / "none")).chunks(text)


@settings(deadline=None, max_examples=300)
@given(any_text(60, without=(UNASSIGNED,)))
def test_chunks_of_any_text_are_disjoint_and_within_a_clause(text: str) -> None:
    chunks = LABELLER.chunks(text)
    assert all(a.end <= b.start for a, b in pairwise(chunks))
    for start, end, idiom in chunks:
        assert idiom or 2 <= end - start <= 8
        assert 2 * sum(map(is_han, text[start:end])) >= end - start
        assert all(char.isalnum() for char in text[start:end])


# ---- alignment


def test_labels_of_characters() -> None:
    letters, clauses, made = label_chars("他三心二意地读书，hi 好，学生。")
    assert letters == "OBIIIOBIO---OOBIO"
    assert clauses == [0] * 8 + [-1] * 4 + [1, -1, 2, 2, -1]
    assert (made.chunk_count, made.idiom_count) == (3, 1)
    assert made.coverage == 2 / 3  # 好 has no chunk
    assert made.labels_T.dtype == np.int8 and made.clause_T.dtype == np.int32


def test_tokens_that_reach_over_a_border() -> None:
    text = "他读书。"  # one chunk: characters 1 and 2
    assert LABELLER.chunks(text) == [Chunk(1, 3, False)]
    cases = {
        ((0, 1), (1, 3), (3, 4)): [2, 3, 2],  # the chunk is one token
        ((0, 2), (2, 3), (3, 4)): [2, 3, 2],  # the first token is covered in part
        ((0, 1), (1, 2), (2, 4)): [2, 3, 2],
        ((0, 2), (2, 4)): [2, 2],  # no token is wholly inside: dropped
        ((0, 0), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4)): [IGNORED_LABEL, 2, 0, 1, 1, 1, 2],
    }
    for offsets, labels in cases.items():
        made = LABELLER.label(text, offsets)
        assert made.labels_T.tolist() == labels, offsets
        assert made.chunk_count == (1 if {0, 3} & set(labels) else 0)
        assert made.coverage == made.chunk_count


def test_a_token_over_two_clauses_is_of_the_first() -> None:
    made = LABELLER.label("读书，学生", [(0, 1), (1, 4), (4, 5)])
    assert made.clause_T.tolist() == [0, 0, 1]
    assert made.labels_T.tolist() == [3, 2, 3]


@settings(deadline=None, max_examples=300)
@given(any_text(40, without=(SURROGATES, UNASSIGNED)), st.sampled_from([300, 600]))
def test_labels_are_those_of_the_definition(text: str, size: int) -> None:
    offsets = offsets_of(text, tokenizer(size))
    made = LABELLER.label(text, offsets)
    assert made.labels_T.tolist() == reference_labels(text, offsets)
    check_clauses(text, offsets, made)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_labels_of_any_tokens_are_those_of_the_definition(data: st.DataObject) -> None:
    text = data.draw(any_text(30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    offsets = list(zip([0, *cuts], [*cuts, len(text)], strict=True))
    made = LABELLER.label(text, offsets)
    assert made.labels_T.tolist() == reference_labels(text, offsets)
    wanted = reference_coverage(made.labels_T.tolist(), made.clause_T.tolist())
    assert coverage(made.labels_T, made.clause_T) == wanted


def check_clauses(text: str, offsets: list[tuple[int, int]], made: LabelledTokens) -> None:
    """Clauses count up from 0, hold Han characters, and end at punctuation."""
    clauses = made.clause_T[made.clause_T >= 0]
    assert (np.diff(clauses) >= 0).all()
    for t, ((start, end), clause) in enumerate(zip(offsets, made.clause_T, strict=True)):
        inside = text[start:end]
        if any(map(is_han, inside)):
            assert clause >= 0
        if clause >= 0 and inside:
            assert made.labels_T[t] != IGNORED_LABEL and any(
                char.isnumeric() or is_han(char) for char in inside
            )
    labels, ids = made.labels_T.tolist(), made.clause_T.tolist()
    covered, total = reference_coverage(labels, ids)
    assert coverage(made.labels_T, made.clause_T) == (covered, total)
    assert math.isnan(made.coverage) if total == 0 else made.coverage == covered / total


@pytest.mark.parametrize("size", [300, 600])
def test_labels_of_real_documents(size: int) -> None:
    for lang in ("zh", "en"):
        text = load_sample(lang, "heldout")[0].text
        offsets = offsets_of(text, tokenizer(size))
        made = LABELLER.label(text, offsets)
        assert made.labels_T.tolist() == reference_labels(text, offsets)
        check_clauses(text, offsets, made)
        assert (made.coverage > 0.7) if lang == "zh" else math.isnan(made.coverage)


@pytest.mark.real_weights
def test_labels_of_smollm2_tokens() -> None:
    source = ModelSource.parse("smollm2-135m")
    made_tokenizer = AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file)
    text = load_sample("zh", "heldout")[0].text[:2000] + "\nOne more: 读书破万卷，下笔如有神。😀"
    offsets = offsets_of(text, made_tokenizer)
    made = LABELLER.label(text, offsets)
    assert made.labels_T.tolist() == reference_labels(text, offsets)
    check_clauses(text, offsets, made)
    # 读 is two tokens, each of which reports the whole character.
    assert offsets_of("读书", made_tokenizer)[:2] == [(0, 1), (0, 1)]


def test_english_needs_no_segmenter() -> None:
    before = load_segmenter.cache_info()
    made = LABELLER.label("No Chinese here, 3 words.", [(0, 2), (2, 10)])
    assert load_segmenter.cache_info() == before
    assert made.labels_T.tolist() == [IGNORED_LABEL] * 2 and math.isnan(made.coverage)
    assert made.chunk_count == made.idiom_count == 0


def test_empty_text_and_no_tokens() -> None:
    for made in (LABELLER.label("", []), LABELLER.label("读书", [])):
        assert len(made.labels_T) == len(made.clause_T) == 0 and math.isnan(made.coverage)


@pytest.mark.parametrize("offsets", [[(0, 3)], [(-1, 1)]])
def test_offsets_of_another_text_are_refused(offsets: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="text of 2 characters"):
        LABELLER.label("读书", offsets)


def test_a_pickled_labeller_gives_the_same_labels() -> None:
    text = "他三心二意地读书。"
    offsets = [(i, i + 1) for i in range(len(text))]
    copy = pickle.loads(pickle.dumps(LABELLER))
    assert copy == LABELLER
    assert (
        copy.label(text, offsets).labels_T.tolist()
        == LABELLER.label(text, offsets).labels_T.tolist()
    )


def test_spans_and_tokens() -> None:
    spans = [(1, 3), (4, 6)]
    tokens = np.array(
        [[0, 1], [0, 2], [1, 3], [2, 5], [5, 6], [6, 7], [4, 4], [5, 5], [6, 6], [9, 9]]
    )
    assert overlapping(spans, tokens).tolist() == [-1, 0, 0, 0, 1, -1, -1, 1, -1, -1]
    assert contained_in(spans, tokens).tolist() == [-1, -1, 0, -1, 1, -1, -1, -1, -1, -1]
    assert overlapping([], tokens).tolist() == contained_in([], tokens).tolist() == [-1] * 10


def test_a_token_without_characters_ends_neither_chunk_nor_clause() -> None:
    made = LABELLER.label("他读书", [(0, 0), (0, 1), (1, 2), (2, 2), (2, 3), (3, 3)])
    ignored = IGNORED_LABEL
    assert made.labels_T.tolist() == [ignored, 2, 0, ignored, 1, ignored]
    assert made.clause_T.tolist() == [-1, 0, 0, 0, 0, -1]
    assert coverage(made.labels_T, made.clause_T) == (1, 1)


def test_bios_of_chunk_numbers() -> None:
    chunk_T = np.array([-1, 0, 1, 1, 2, 2, 2, -1, -1], dtype=np.int32)
    chinese_T = np.array([False] + [True] * 7 + [False])
    assert bios_labels(chunk_T, chinese_T).tolist() == [-100, 3, 0, 1, 0, 1, 1, 2, -100]


# ---- coverage


def test_coverage_by_hand() -> None:
    labels = np.array([2, 0, 1, 2, 2, 2, 3, -100, 2], dtype=np.int8)
    clauses = np.array([0, 0, 0, -1, 1, 1, 2, -1, 0], dtype=np.int32)
    assert coverage(labels, clauses) == (2, 4)  # the last clause 0 is of the next document
    assert coverage(labels[2:6], clauses[2:6]) == (1, 2)  # a window cuts a chunk and a clause
    assert coverage_frac(labels[4:6], clauses[4:6]) == 0
    assert math.isnan(coverage_frac(labels[7:8], clauses[7:8]))
    assert coverage(labels[:0], clauses[:0]) == (0, 0)


def test_coverage_adds_up_over_windows_at_clause_ends() -> None:
    text = load_sample("zh", "heldout")[1].text
    made = LABELLER.label(text, offsets_of(text, tokenizer(300)))
    ends = np.flatnonzero(made.clause_T < 0)[::7]
    windows = np.split(np.arange(len(made.clause_T)), ends)
    parts = [coverage(made.labels_T[window], made.clause_T[window]) for window in windows]
    assert tuple(map(sum, zip(*parts, strict=True))) == coverage(made.labels_T, made.clause_T)


@pytest.mark.real_weights
def test_the_speed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "他三心二意地读书。"}\n{"text": "hello"}\n', encoding="utf-8")
    assert main(["speed", str(path), "--tokenizer", "smollm2-135m"]) == 0
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "MB/s" in printed and "2 chunks, 1 idioms" in printed
    assert "coverage of a document: mean 1.000" in printed
