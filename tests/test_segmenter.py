"""Word segmentation against pkuseg itself, and the score against hand-made and random counts."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbs_rl.data.pkuseg_features import FeatureLists
from fbs_rl.data.samples import load_sample
from fbs_rl.data.segmentation_score import main, read_gold, score_words, word_spans
from fbs_rl.data.segmenter import MAX_PIECE_CHARS, load_segmenter, segment

# Written for this project and segmented by its authors, after the PKU convention.
GOLD = (
    "昨天 下午 ， 我们 在 图书馆 讨论 了 这个 问题 。",
    "这 本 书 介绍 了 语言 模型 的 基本 原理 。",
    "北京 的 秋天 天气 很 好 ， 适合 出去 走走 。",
    "他 每天 早上 六点 起床 ， 先 跑步 ， 再 吃 早饭 。",
    "经济 发展 离不开 科学 技术 的 进步 。",
    "老师 让 学生 们 把 作业 交给 班长 。",
    "火车 晚点 了 两 个 小时 ， 旅客 们 都 很 着急 。",
    "她 对 音乐 一往情深 ， 从 不 三心二意 。",
)
ODD = " \t\n\u3000\u2028\x1c\x00.-|*１９％ａＺ几百，。！“”…😀𠀀龘é\u0301\ud800\ud801\udfffABz0中国人民"


def any_text(max_size: int) -> st.SearchStrategy[str]:
    """Unicode of all kinds, lone surrogates included, with what pkuseg treats in its own way overweighted."""
    chars = st.one_of(
        st.sampled_from(ODD),
        st.sampled_from("我们在北京大学读书破万卷的时候了不起"),
        st.characters(exclude_categories=()),
    )
    return st.text(chars, max_size=max_size)


@pytest.fixture(scope="module")
def pkuseg_itself() -> Any:
    import pkuseg

    return pkuseg.pkuseg()


@pytest.fixture(scope="module")
def feature_lists(pkuseg_itself: Any) -> FeatureLists:
    return FeatureLists(pkuseg_itself.feature_extractor)


def sentences() -> list[str]:
    texts = [document.text for document in load_sample("zh", "heldout")]
    return [piece for text in texts for piece in re.findall(r"[^\s。]+。?", text)][:400]


@settings(deadline=None, max_examples=1000)
@given(any_text(max_size=40))
def test_features_are_pkusegs_in_order(
    pkuseg_itself: Any, feature_lists: FeatureLists, text: str
) -> None:
    extractor = pkuseg_itself.feature_extractor
    nodes = list(extractor.normalize_text(text))
    assert feature_lists(text) == [
        extractor.get_node_features_idx(i, nodes) for i in range(len(nodes))
    ]


def test_features_and_words_of_real_sentences_are_pkusegs(
    pkuseg_itself: Any, feature_lists: FeatureLists
) -> None:
    extractor = pkuseg_itself.feature_extractor
    for sentence in sentences():
        nodes = list(extractor.normalize_text(sentence))
        wanted = [extractor.get_node_features_idx(i, nodes) for i in range(len(nodes))]
        assert feature_lists(sentence) == wanted
        assert load_segmenter().words(sentence) == pkuseg_itself.cut(sentence)


@settings(deadline=None, max_examples=1000)
@given(any_text(max_size=60))
def test_words_of_any_piece_are_pkusegs(pkuseg_itself: Any, text: str) -> None:
    for piece in text.split():
        assert load_segmenter().words(piece) == pkuseg_itself.cut(piece)


@settings(deadline=None, max_examples=1000)
@given(any_text(max_size=80), st.integers(0, 20))
def test_words_cover_the_text_but_for_white_space(text: str, start: int) -> None:
    spans = segment(text, start, len(text) - 3)
    covered = {place for span in spans for place in range(*span)}
    within = range(start, max(start, len(text) - 3))
    assert covered == {place for place in within if not text[place].isspace()}
    assert sum(end - start for start, end in spans) == len(covered)  # disjoint
    assert all(a < b <= c < d for (a, b), (c, d) in pairwise(spans))


def test_a_long_text_without_punctuation_is_cut() -> None:
    text = "我们在北京大学读书" * 1000
    spans = segment(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert max(end - start for start, end in spans) <= 8
    assert any(end == MAX_PIECE_CHARS for _, end in spans)


def test_a_sentence_keeps_its_closing_marks() -> None:
    text = "他说：“我们走吧！”　\n大家 都走了。"
    words = [text[start:end] for start, end in segment(text)]
    assert words[-7:] == ["！", "”", "大家", "都", "走", "了", "。"]


def test_score_counts_words_with_the_gold_borders() -> None:
    gold, found = word_spans(["我们", "在", "北京大学"]), word_spans(["我们", "在", "北京", "大学"])
    score = score_words([gold], [found])
    assert (score.gold, score.found, score.correct) == (3, 4, 2)
    assert (score.precision, score.recall) == (2 / 4, 2 / 3)
    assert score.f1 == pytest.approx(2 / (1 / (2 / 4) + 1 / (2 / 3)))
    nothing = score_words([[(0, 1)]], [[]])
    assert (nothing.precision, nothing.recall, nothing.f1) == (0, 0, 0)
    assert score_words([gold], [gold]).f1 == 1


def test_pkuseg_finds_the_words_of_plain_sentences() -> None:
    gold = [line.split() for line in GOLD]
    score = score_words(list(map(word_spans, gold)), [segment("".join(words)) for words in gold])
    assert score.f1 >= 0.8


def test_gold_files_of_both_formats(tmp_path: Path) -> None:
    plain, lines = tmp_path / "gold.utf8", tmp_path / "gold.jsonl.gz"
    plain.write_text("\n".join(GOLD) + "\n", encoding="utf-8")
    with gzip.open(lines, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"words": line.split()}) + "\n" for line in GOLD)
    assert read_gold(plain) == read_gold(lines) == [line.split() for line in GOLD]


def test_the_command_prints_both_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gold.txt"
    path.write_text("\n".join(GOLD), encoding="utf-8")
    assert main(["f1", str(path)]) == 0
    printed = capsys.readouterr().out
    found = [float(score) for score in re.findall(r"F1 ([\d.]+)", printed)]
    assert len(found) == 2 and min(found) >= 0.8 and "2 idioms" in printed


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}\n", b"no json\n", b"[]\n"])
def test_the_command_refuses_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "gold.jsonl"
    path.write_bytes(content)
    assert main(["f1", str(path)]) == 2
    assert main(["f1", str(tmp_path / "none")]) == 2
    assert all(
        line.startswith("segmentation_score: ") for line in capsys.readouterr().err.splitlines()
    )
