"""What gets into a pool, the order it is read in, and its folder."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fbs_rl.rl.answer_format import AnswerFormat, Turn
from fbs_rl.rl.question_pool import PoolConfig, QuestionPool, build_pool, default_pool, main
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
from tests.small_tokenizer import saveable_tokenizer

LONG = (
    "Of the many rivers that flow from these mountains to the southern sea, which is the longest?"
)
ZH_LONG = "根据我国现行宪法的规定，全国人民代表大会每届任期是多少年"


def row(question: str, choices: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"question": question, "choices": choices or ["yes", "no"], "answer": "A"} | more


def pool_of(
    tmp_path: Path, rows: list[dict[str, Any]], against: list[dict[str, Any]] | None = None, **more: Any
) -> QuestionPool:  # fmt: skip
    source = write_jsonl(tmp_path / "mine" / "train.jsonl", rows)
    files = [] if against is None else [str(write_jsonl(tmp_path / "eval.jsonl", against))]
    return build_pool([str(source)], files, PoolConfig(**more))


def ids(pool: QuestionPool) -> set[str]:
    return {question.id for question in (*pool.train, *pool.heldout)}


# --- filters ----------------------------------------------------------------------------------------


def test_equal_questions_are_there_once(tmp_path: Path) -> None:
    rows = [
        row(QUESTION, OPTIONS),
        row(QUESTION.upper(), OPTIONS),
        row(QUESTION, OPTIONS[::-1], answer="C"),
        row(QUESTION, [*OPTIONS[:3], "Spleen"]),
        row(f"（{ZH_QUESTION}）", ZH_OPTIONS),
        row(ZH_QUESTION.replace("____。", ""), ZH_OPTIONS),
    ]
    pool = pool_of(tmp_path, rows)
    assert ids(pool) == {f"mine/train/{n}" for n in (0, 3, 4)}
    assert pool.manifest["removed"] == {"duplicate": 3}
    assert pool.manifest["removed_examples"]["duplicate"][0] == "mine/train/1: mine/train/0"
    assert pool.manifest["questions"]["by_language"] == {"en": 2, "zh": 1}


@pytest.mark.parametrize(
    "asked, evaluated, reason",
    [
        ("Who was first?", "who was first", "in an evaluation file"),
        (f"Note: {LONG}", f"{LONG} Choose one.", "shares a run of words with an evaluation file"),
        (f"{ZH_LONG}？", f"下面，{ZH_LONG}：", "shares a run of words with an evaluation file"),
        ("Who was first?", "Who was first again?", None),
        (LONG, "These mountains, from which the rivers flow: which is the longest?", None),
        (ZH_LONG, "全国人民代表大会的每届任期", None),
    ],
)
def test_what_is_in_an_evaluation_file_is_dropped(
    tmp_path: Path, asked: str, evaluated: str, reason: str | None
) -> None:
    pool = pool_of(tmp_path, [*many(3), row(asked)], [row("Another?"), row(evaluated)])
    assert ("mine/train/3" not in ids(pool)) == (reason is not None)
    assert pool.manifest["removed"] == ({} if reason is None else {reason: 1})
    if reason is not None:
        detail = f"mine/train/3: {tmp_path}/eval.jsonl:2"
        assert pool.manifest["removed_examples"] == {reason: [detail]}


def test_a_run_of_words_may_reach_into_the_options(tmp_path: Path) -> None:
    options = ["the longest of its rivers", "the deepest of its lakes", "none of these at all"]
    evaluated = row("In this country, which is it?", options)
    pool = pool_of(tmp_path, [*many(2), row("And there, which is it?", options)], [evaluated])
    assert ids(pool) == {"mine/train/0", "mine/train/1"}


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "json"])
def test_evaluation_files_of_any_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"eval_test.{kind}"
    if kind == "csv":
        write_csv(path, [["What is 1 plus 2?", "a", "b", "c", "d", "A"]])
    elif kind == "parquet":
        write_parquet(path, [{"prompt": "What is 1 plus 2?", "target": "3"}])
    elif kind == "txt":
        path.write_text("What is 1 plus 2?\n")
    else:
        write_jsonl(path, [{"turns": [{"user": "What is 1 plus 2?"}]}])
    source = write_jsonl(tmp_path / "mine" / "train.jsonl", many(4))
    pool = build_pool([str(source)], [str(path)])
    assert ids(pool) == {f"mine/train/{n}" for n in (0, 2, 3)}
    described = pool.manifest["evaluation"]["files"][0]
    assert (described["name"], described["rows"]) == (str(path), 1)
    assert re.fullmatch("[0-9a-f]{64}", described["sha256"])


def test_an_evaluation_row_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"question": "x"}\n{"question": \n')
    source = write_jsonl(tmp_path / "train.jsonl", many(3))
    with pytest.raises(ValueError, match=r"eval.jsonl:2 is not JSON .*; correct the evaluation"):
        build_pool([str(source)], [str(tmp_path / "eval.jsonl")])
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        build_pool([str(source)], [str(tmp_path / "other.jsonl")])


def test_a_carve_out_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    rows = [
        r | {"subject": s} for r, s in zip(many(4), ("arts", "arts", "law", "law"), strict=True)
    ]
    path = str(write_jsonl(tmp_path / "cmmlu" / "test.jsonl", rows))
    pool = build_pool([path], [path], PoolConfig(carve_out=("cmmlu/arts",), heldout_frac=0))
    assert [q.id for q in pool.train] == ["cmmlu/arts/test/0", "cmmlu/arts/test/1"]
    assert pool.manifest["carve_out"] == ["cmmlu/arts"]
    assert pool.manifest["removed"] == {"of a test split": 2}
    assert pool.manifest["evaluation"]["files"][0]["excluded"] == 2
    with pytest.raises(ValueError, match=r"no source has a question of cmmlu/art in a test split"):
        build_pool([path], [], PoolConfig(carve_out=("cmmlu/art",)))
    with pytest.raises(
        ValueError, match=r"no question is left .* 4 rows, of them 4 of a test split"
    ):
        build_pool([path])


def test_a_file_named_twice_is_read_once_and_ids_stay_apart(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a" / "mine" / "train.jsonl", many(2))
    two = write_jsonl(tmp_path / "b" / "mine" / "train.jsonl", many(4)[2:])
    pool = build_pool([str(one), str(tmp_path / "a"), str(two)])
    assert pool.manifest["rows"] == 4 and len(ids(pool)) == 4
    assert sum("~" in name for name in ids(pool)) == 2


def test_counts_and_licences_are_in_the_manifest(tmp_path: Path) -> None:
    rows = [*many(3, licence="CC0-1.0"), {"question": "?"}, *many(5)[3:]]
    pool = pool_of(tmp_path, rows)
    source = pool.manifest["sources"][0]
    assert (source["rows"], source["malformed"], source["kept"]) == (6, 1, 5)
    assert source["bytes"] == (tmp_path / "mine" / "train.jsonl").stat().st_size
    assert pool.manifest["licences"] == {"mine": ["CC0-1.0", None]}
    assert pool.manifest["malformed_examples"][0].startswith(f"{source['name']}:4 has no")
    assert json.loads(json.dumps(pool.manifest)) == pool.manifest


# --- shots ------------------------------------------------------------------------------------------


def test_shots_are_other_questions_of_the_subject_in_dev(tmp_path: Path) -> None:
    rows = [
        r | {"subject": s, "split": split}
        for r, s, split in zip(
            many(5), ("arts", "arts", "law", "arts", "law"), ("dev", "dev", "dev", "val", "val"),
            strict=True,
        )
    ]  # fmt: skip
    pool = pool_of(tmp_path, rows, answer_format=AnswerFormat(shots=2), heldout_frac=0)
    asked = {q.id: re.findall(r"What is (\d) plus", q.prompt) for q in (*pool.train, *pool.heldout)}
    assert asked == {
        "mine/arts/dev/0": ["1", "0"],
        "mine/arts/dev/1": ["0", "1"],
        "mine/law/dev/0": ["2"],
        "mine/arts/val/0": ["0", "1", "3"],
        "mine/law/val/0": ["2", "4"],
    }
    assert pool.manifest["with_fewer_shots"] == 4
    with pytest.raises(ValueError, match="1 shots were asked for, but no source has a dev split"):
        pool_of(tmp_path, many(3), answer_format=AnswerFormat(shots=1))


# --- split and order --------------------------------------------------------------------------------


def test_the_split_hangs_on_text_and_seed_alone(tmp_path: Path) -> None:
    few, more = write_jsonl(tmp_path / "a.jsonl", many(150)), many(300)[::-1]
    small = build_pool([str(few)], (), PoolConfig(heldout_frac=0.2))
    large = pool_of(tmp_path, more, heldout_frac=0.2)

    def texts(pool: QuestionPool) -> set[str]:
        return {q.prompt.split("\n")[-4] for q in pool.heldout}

    first = {r["question"] for r in many(150)}
    assert texts(small) == texts(large) & first
    assert 30 <= len(large.heldout) <= 90  # 60 expected, give or take 7
    assert len(large.train) + len(large.heldout) == 300
    assert texts(pool_of(tmp_path, more, heldout_frac=0.2, seed=1)) != texts(large)
    assert pool_of(tmp_path, more, heldout_frac=0).heldout == ()


def test_an_epoch_is_shuffled_and_repeats_nothing(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, many(23), heldout_frac=0)
    steps = 23 // 5
    epochs = [
        [q.id for step in range(steps) for q in pool.batch(e * steps + step, 5)] for e in range(40)
    ]
    assert all(len(epoch) == len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40
    assert set(chain(*epochs)) == ids(pool)  # what one epoch leaves over, another has


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    pool, again = (pool_of(tmp_path, many(23), heldout_frac=0) for _ in range(2))
    other = pool_of(tmp_path, many(23), heldout_frac=0, seed=1)
    steps = (7, 0, 3, 7)
    assert [pool.batch(step, 4) for step in steps] == [again.batch(step, 4) for step in steps]
    assert pool.batch(7, 4) != other.batch(7, 4) and pool.digest == other.digest
    assert {q.id for q in pool.batch(5, 23)} == ids(pool)
    for size in (0, 24):
        with pytest.raises(ValueError, match=f"{size} questions a step .* give 1 to 23"):
            pool.batch(0, size)


def test_prompts_that_are_too_long_are_counted_and_gone(tmp_path: Path) -> None:
    tokenizer = saveable_tokenizer()
    pool = pool_of(tmp_path, [*many(9), row("very " * 80), row("so " * 90)], heldout_frac=0.3)
    short, encoded = pool.encode(tokenizer, 180)
    assert ids(short) == set(encoded) == ids(pool) - {"mine/train/9", "mine/train/10"}
    assert short.manifest["removed"] == {"prompt too long": 2}
    assert short.manifest["digest"] == short.digest != pool.digest
    again, _ = short.encode(tokenizer, 180)
    assert again.manifest == short.manifest
    assert {q.id for q in short.batch(0, len(short.train))} <= set(encoded)
    with pytest.raises(ValueError, match="no prompt of the pool has at most 3 tokens"):
        pool.encode(tokenizer, 3)


# --- folder -----------------------------------------------------------------------------------------


def test_a_written_pool_reads_back_the_same(tmp_path: Path) -> None:
    rows = [*many(20), row("line\u2028separator", ZH_OPTIONS)]
    made = pool_of(tmp_path, rows, answer_format=AnswerFormat(turn=Turn.CHAT), seed=3)
    made.write(tmp_path / "pool")
    read = QuestionPool.read(tmp_path / "pool")
    assert read == made and read.batch(11, 4) == made.batch(11, 4)
    assert sorted(p.name for p in (tmp_path / "pool").iterdir()) == [
        "manifest.json", "questions.jsonl",
    ]  # fmt: skip


def test_a_pool_that_was_changed_is_refused(tmp_path: Path) -> None:
    pool_of(tmp_path, many(20)).write(tmp_path / "pool")
    path = tmp_path / "pool" / "questions.jsonl"
    whole = path.read_text()
    for changed in (whole.replace("plus", "minus", 1), whole[:-30], "", "[]\n"):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"cannot be used .*; make it again"):
            QuestionPool.read(tmp_path / "pool")
    with pytest.raises(FileNotFoundError, match=r"holds no pool of questions"):
        QuestionPool.read(tmp_path)


# --- the sample that ships --------------------------------------------------------------------------


def test_the_default_pool_is_permissive_small_and_bilingual() -> None:
    pool = default_pool()
    assert pool.manifest["questions"]["by_source"] == {"mmlu": 559, "cmath": 551}
    assert pool.manifest["questions"]["by_language"] == {"en": 559, "zh": 551}
    assert pool.manifest["licences"] == {"cmath": ["MIT"], "mmlu": ["MIT"]}
    assert pool.manifest["removed"] == {} and pool.manifest["malformed"] == 0
    folder = Path(str(files("fbs_rl.rl") / "samples"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 400_000
    notices = (folder / "LICENCES.md").read_text(encoding="utf-8")
    assert all(f"{source}.jsonl" in notices for source in pool.manifest["licences"])
    assert {len(q.answer) > 1 and q.answer[0] for q in pool.train} == {" "}


# --- the command ------------------------------------------------------------------------------------


def test_the_command_writes_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "mine" / "train.jsonl", [*many(10), many(1)[0], {"a": 1}])
    against = write_jsonl(tmp_path / "eval.jsonl", many(2))
    words = [str(source), "--against", str(against), "--out", str(tmp_path / "pool"), "--seed", "4"]
    assert main([*words, "--gold", "letter", "--heading", "none"]) == 0
    said = capsys.readouterr().out
    pool = QuestionPool.read(tmp_path / "pool")
    assert pool.seed == 4 and len(ids(pool)) == 8
    assert {q.answer for q in pool.train} == {" B"}
    assert pool.train[0].prompt.startswith("What is")
    assert f"{source}: 8 of 12 rows kept" in said
    assert (
        "removed, in an evaluation file: 3" in said and f"malformed: 1, first {source}:12" in said
    )
    assert f"digest: {pool.digest}" in said and "held out (en 8)" in said
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_without_a_source_takes_the_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "pool")]) == 0
    assert "not compared with any evaluation file" in capsys.readouterr().out
    assert QuestionPool.read(tmp_path / "pool").train == default_pool().train


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nothing.jsonl"], "there is no file or folder nothing.jsonl"),
        (["hf:owner/name"], "needs the Hugging Face hub"),
        (["--heldout-frac", "1"], "heldout_frac is 1.0; give a share in [0, 1)"),
        (["--shots", "-2"], "-2 shots were asked for"),
        (["--seed", "-2"], "seed is -2"),
        (["--malformed-limit", "-1"], "malformed_limit is -1"),
        (["--carve-out", "agronomy"], "name SET/SUBJECT"),
        (["--gold", "all"], "--help lists all options"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*words, "--out", str(tmp_path / "pool")]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "pool").exists()
