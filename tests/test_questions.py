"""Reading questions: published layouts, rows that are none, what paths say, which texts are equal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from fbs_rl.rl.question_files import Place, find_files
from fbs_rl.rl.question_readers import ReadCounts, read_questions
from fbs_rl.rl.questions import SourceQuestion, normalised
from tests.question_fixtures import (
    OPTIONS,
    QUESTION,
    ZH_OPTIONS,
    ZH_QUESTION,
    many,
    write_csv,
    write_jsonl,
    write_parquet,
)


def read(
    path: Path, limit: int = 0, carve_out: frozenset[str] = frozenset()
) -> tuple[list[SourceQuestion], ReadCounts]:
    counts = ReadCounts()
    found = [
        question
        for file in find_files(str(path))
        for question in read_questions(file, counts, limit, carve_out)
    ]
    return found, counts


# --- layouts ----------------------------------------------------------------------------------------


def test_mmlu_as_published_has_no_header(tmp_path: Path) -> None:
    for split in ("dev", "val"):
        path = tmp_path / "data" / split / f"college_anatomy_{split}.csv"
        write_csv(path, [[QUESTION, *OPTIONS, "B"], ["question", "a", "b", "c", "d", "D"]][:1])
    found, counts = read(tmp_path / "data")
    assert [q.id for q in found] == [f"mmlu/college_anatomy/{s}/0" for s in ("dev", "val")]
    first = found[0]
    assert (first.text, first.choices) == (QUESTION, tuple(OPTIONS))
    assert (first.gold, first.answer, first.language) == (1, "Lung, left", "en")
    assert first.licence == "MIT" and (counts.rows, counts.malformed) == (2, 0)


def test_cmmlu_and_ceval_as_published(tmp_path: Path) -> None:
    cmmlu = [["", "Question", "A", "B", "C", "D", "Answer"], [7, ZH_QUESTION, *ZH_OPTIONS, "D"]]
    write_csv(tmp_path / "one" / "dev" / "agronomy.csv", cmmlu)
    ceval = [
        ["id", "question", "A", "B", "C", "D", "answer", "explanation"],
        [3, ZH_QUESTION, *ZH_OPTIONS, "D", "1. 绍鸭\n2. 产蛋量高"],
    ]
    write_csv(tmp_path / "two" / "dev" / "accountant_dev.csv", ceval, "utf-8-sig")
    (one,), _ = read(tmp_path / "one")
    (two,), _ = read(tmp_path / "two")
    assert (one.id, two.id) == ("cmmlu/agronomy/dev/7", "ceval/accountant/dev/3")
    for question in (one, two):
        assert (question.text, question.choices) == (ZH_QUESTION, tuple(ZH_OPTIONS))
        assert (question.answer, question.language) == ("绍鸭", "zh")
        assert question.licence == "CC BY-NC-SA 4.0"
    assert one.key == two.key


def test_layouts_of_the_hub(tmp_path: Path) -> None:
    row = {"question": QUESTION, "subject": "anatomy", "choices": OPTIONS, "answer": 1}
    name = "0000-of-00001.parquet"
    write_parquet(tmp_path / "mmlu" / "all" / f"validation-0{name}", [row])
    write_parquet(tmp_path / "mmlu" / "auxiliary_train" / f"train-0{name}", [{"train": row}])
    columns = dict(zip("ABCD", ZH_OPTIONS, strict=True))
    row = {"Question": ZH_QUESTION, **columns, "Answer": "D"}
    write_parquet(tmp_path / "cmmlu" / "agronomy" / "dev" / "0000.parquet", [row, row])
    row = {"id": 4, "question": ZH_QUESTION, **columns, "answer": "D", "explanation": ""}
    write_parquet(tmp_path / "ceval-exam" / "accountant" / f"val-0{name}", [row])
    found, _ = read(tmp_path / "mmlu")
    assert [q.id for q in found] == ["mmlu/anatomy/val/0", "mmlu/anatomy/train/0"]
    assert all((q.text, q.choices, q.gold) == (QUESTION, tuple(OPTIONS), 1) for q in found)
    assert [q.id for q in read(tmp_path / "cmmlu")[0]] == [f"cmmlu/agronomy/dev/{n}" for n in "01"]
    assert [q.id for q in read(tmp_path / "ceval-exam")[0]] == ["ceval/accountant/val/4"]


@pytest.mark.parametrize("answer", ["B", "b", " B ", 1, "two"])
def test_a_row_of_ones_own(tmp_path: Path, answer: object) -> None:
    row = {"question": " How many? ", "choices": [1, "two "], "answer": answer, "source": "mine"}
    (question,), _ = read(write_jsonl(tmp_path / "x" / "train.jsonl", [row]))
    assert (question.id, question.text, question.answer) == ("mine/train/0", "How many?", "two")
    assert question.choices == ("1", "two") and question.licence == ""


def test_open_and_verbatim_questions(tmp_path: Path) -> None:
    rows = [
        {"question": "小猫吃了几条鱼？", "answer": 5},
        {"prompt": "Two and two is", "answer": " four", "licence": "CC0-1.0"},
        {"input": "还剩多少页？", "golden": "9"},
    ]
    found, _ = read(write_jsonl(tmp_path / "x.jsonl", rows))
    assert [(q.text, q.answer, q.language) for q in found] == [
        ("小猫吃了几条鱼？", "5", "zh"),
        ("Two and two is", " four", "en"),
        ("还剩多少页？", "9", "zh"),
    ]
    assert [q.verbatim for q in found] == [False, True, False]
    assert found[1].licence == "CC0-1.0"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_files(tmp_path: Path, kind: str, ending: str) -> None:
    import zstandard

    rows = many(3)
    plain = tmp_path / f"val.{kind}"
    if kind == "csv":
        write_csv(plain, [[r["question"], *r["choices"], "B"] for r in rows])
    else:
        write_jsonl(plain, rows)
    pack = gzip.compress if ending == ".gz" else zstandard.compress
    packed = tmp_path / f"packed_val.{kind}{ending}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert [q.key for q in read(packed)[0]] == [q.key for q in read(plain)[0]]
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        read(packed)


# --- rows and files that cannot be used -------------------------------------------------------------

GOOD: dict[str, Any] = {"question": "Which?", "choices": ["a one", "a two"], "answer": "A"}


@pytest.mark.parametrize(
    "row, problem",
    [
        (GOOD | {"question": " "}, "has no question"),
        (GOOD | {"answer": None}, "has no answer"),
        (GOOD | {"answer": "C"}, "'C', which is none of its choices"),
        (GOOD | {"answer": 2}, "has the answer 2, but 2 choices"),
        (GOOD | {"answer": True}, "none of its choices"),
        (GOOD | {"choices": ["one"]}, "needs 2 to 26 choices"),
        (GOOD | {"choices": "one"}, "needs 2 to 26 choices"),
        (GOOD | {"choices": ["one", ""]}, "has an empty choice"),
        (GOOD | {"choices": ["one", None]}, "a choice that is no text"),
        ({"question": "Which?", "A": "", "B": "b", "answer": "A"}, "needs 2 to 26 choices"),
        ({"prompt": "", "answer": "x"}, "has no question (prompt)"),
        (GOOD | {"question": "\ud800?"}, "half a surrogate pair"),
    ],
)
def test_a_row_that_is_no_question_is_reported_with_its_line(
    tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, row, GOOD)))
    found, counts = read(path, limit=1)
    assert [q.index for q in found] == ["0", "2"]
    assert (counts.rows, counts.malformed) == (3, 1)
    assert counts.examples[0].startswith(f"{path}:2 ") and problem in counts.examples[0]
    with pytest.raises(ValueError, match=r"1 rows are no questions, more than the limit of 0"):
        read(path)


def test_malformed_lines_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": \n[1]\n\n\xff\xfe\n' + json.dumps(GOOD).encode())
    found, counts = read(path, limit=9)
    problems = [example.removeprefix(f"{path}:") for example in counts.examples]
    assert len(found) == 1 and [problem[:15] for problem in problems] == [
        "1 is not JSON (", "2 is no JSON ob", "4 is not UTF-8",
    ]  # fmt: skip
    rows = [["Why\nnot?", "a", "b", "A"], ["Who?", "a", "A"], ["How?", "a", "b", "B"]]
    found, counts = read(write_csv(tmp_path / "q_dev.csv", rows), limit=9)
    assert [q.text for q in found] == ["Why\nnot?", "How?"]
    assert counts.examples == [f"{tmp_path}/q_dev.csv:3 has 3 columns, not 4"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("q.jsonl", b'[{"question": "x"}]\n', "is one JSON array; write one object a line"),
        ("q.json", b'{\n"question": "x"\n}', "is one JSON value; write one object a line"),
        ("q.csv", "问题,甲,乙,A".encode("gbk"), "is not UTF-8"),
        ("q.parquet", b"PAR1", "cannot be read as Parquet"),
        ("q.txt", b"x", "is plain text; questions come as CSV, JSONL or Parquet"),
        ("q.xlsx", b"x", "unknown extension"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / name, limit=9)


def test_words_that_mean_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="for a data set of the hub write hf:cais/mmlu"):
        find_files("cais/mmlu")
    with pytest.raises(FileNotFoundError, match=r"no file matches \*\.csv"):
        find_files("*.csv")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"holds no \.csv, \.jsonl or \.parquet file"):
        find_files(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="needs the Hugging Face hub, but HF_HUB_OFFLINE is set"):
        find_files("hf:cais/mmlu/all/dev*")


def test_questions_of_a_test_split_wait_for_a_carve_out(tmp_path: Path) -> None:
    rows = [GOOD | {"subject": subject} for subject in ("agronomy", "arts", "agronomy")]
    path = write_jsonl(tmp_path / "cmmlu" / "test.jsonl", rows)
    found, counts = read(path)
    assert found == [] and counts.test_rows == 3
    found, counts = read(path, carve_out=frozenset({"cmmlu/agronomy"}))
    assert [q.id for q in found] == ["cmmlu/agronomy/test/0", "cmmlu/agronomy/test/1"]
    assert counts.test_rows == 1


# --- paths and equal texts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, place",
    [
        ("mmlu/all/auxiliary_train-00000-of-00001.parquet", ("mmlu", "", "auxiliary_train")),
        ("mmlu/abstract_algebra/dev-00000-of-00001.parquet", ("mmlu", "abstract_algebra", "dev")),
        ("x/mmlu/data/val/machine_learning_val.csv", ("mmlu", "machine_learning", "val")),
        ("cmmlu/test/agronomy.csv", ("cmmlu", "agronomy", "test")),
        ("cmmlu/agronomy/test/0000.parquet", ("cmmlu", "agronomy", "test")),
        ("benchmarks/ceval/val.jsonl.gz", ("ceval", "", "val")),
        ("C-Eval/valid/tax_accountant_val.csv", ("ceval", "tax_accountant", "val")),
        ("datasets/cmath_dev.jsonl", ("cmath", "", "dev")),
        ("mine/train.jsonl", ("mine", "", "train")),
        ("mine/biology.jsonl", ("mine", "biology", "")),
        ("mmlu_experiments/mine/biology.jsonl", ("mine", "biology", "")),
        ("biology.jsonl", ("biology", "", "")),
    ],
)
def test_what_a_path_says(path: str, place: tuple[str, str, str]) -> None:
    assert Place.of(PurePosixPath(path)) == Place(*place)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Is it true?", "is  it TRUE ."),
        ("“Ａ１” — (the first)", "a1 the first"),
        ("下列说法，正确的是____。", "下列 说法 正确的是"),
        ("Straße", "STRASSE"),
        ("?!", "?!"),
    ],
)
def test_texts_that_are_equal(one: str, other: str) -> None:
    assert normalised(one) == normalised(other) != ""
    assert normalised(normalised(one)) == normalised(one)


def test_texts_that_are_not_equal() -> None:
    texts = ["2 + 3", "2 = 3", "2 3", "23", "$23", "therapist", "the rapist", "?"]
    assert len({normalised(text) for text in texts}) == len(texts)
