from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fbs_rl.data.__main__ import main, sentence
from fbs_rl.data.shards import PackedShards
from tests.data_corpus import texts, tokenizer_folder, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts("en", 8)])


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def small(corpus: str, out: Path, tokenizer: str) -> tuple[str, ...]:
    """The words of a preparation into rows of 64 tokens."""
    options = ("--tokenizer", tokenizer, "--sequence-tokens", "64")
    return ("prepare", corpus, "--out", str(out), *options)


def test_the_command_says_what_it_made(
    capsys: pytest.CaptureFixture[str], corpus: str, tokenizer: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = small(corpus, out, tokenizer)
    code, said, _ = run(capsys, *words, "--heldout-frac", "0.3", "--seed", "5")
    data = PackedShards.open(out)
    assert code == 0 and f"train    {len(data):,} sequences" in said and data.digest in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["totals"]["train"]["sequences"] == len(data)
    assert (
        summary["mb_per_core_s"]["encode"] > 0 and summary["peak_rss_bytes"]["this_process"] > 1e7
    )
    config: Any = data.manifest.record["config"]
    assert (config["heldout_frac"], config["seed"]) == (0.3, 5)

    # The configuration it leaves starts the same preparation.
    from_file = ("--config", str(out / "config.yaml"), "--workers", "3")
    again = run(capsys, "prepare", corpus, "--out", str(out), *from_file)
    assert again[0] == 0 and "is finished already" in again[1]
    # The folder that holds the output can be the input; the output itself cannot.
    around = run(capsys, "prepare", str(tmp_path), "--out", str(out), *from_file)
    assert around[0] == 0 and "is finished already" in around[1]
    inside = run(capsys, "prepare", str(out), *words[2:])
    assert inside[0] == 2 and "is in the output folder" in inside[2]
    other = run(capsys, *words, "--heldout-frac", "0.3", "--seed", "6")
    assert other[0] == 2 and other[2].startswith(f"{out} holds data prepared with other seed; name")


def test_a_dry_run_estimates_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], corpus: str, tokenizer: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = small(corpus, out, tokenizer)
    code, said, _ = run(capsys, *words, "--dry-run")
    assert code == 0 and not out.exists() and corpus in said
    estimated = int(said.split("sequences of")[0].split()[-1].replace(",", ""))
    assert run(capsys, *words)[0] == 0
    made = sum(len(PackedShards.open(out, split)) for split in ("train", "heldout"))
    assert made * 0.8 < estimated < made * 1.3


def slow_tokenizer(folder: Path) -> str:
    """One without an end token."""
    made = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return str(folder)


def test_mistakes_are_one_sentence_and_leave_nothing(
    capsys: pytest.CaptureFixture[str], corpus: str, tokenizer: str, tmp_path: Path
) -> None:
    no_end = slow_tokenizer(tmp_path / "no_end")
    (tmp_path / "empty").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("x")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    untitled = write_jsonl(tmp_path / "b.jsonl", [{"title": "x"}])
    good = {"--out": str(tmp_path / "out"), "--tokenizer": tokenizer, "--sequence-tokens": "64"}
    mistakes: list[tuple[list[str], dict[str, str], str]] = [
        ([str(tmp_path / "no.jsonl")], {}, "there is no file"),
        ([str(tmp_path / "*.gz")], {}, "no file matches"),
        ([str(tmp_path / "empty")], {}, "holds no file with a known extension"),
        ([untitled], {}, "has no text field: its rows have title"),
        ([corpus], {"--sequence-tokens": "7"}, "sequence_tokens is 7; give at least 8"),
        ([corpus], {"--sequence-tokens": "x"}, "argument --sequence-tokens: invalid int value"),
        (
            [corpus],
            {"--tokenizer": str(tmp_path / "slow")},
            "is not a fast one and cannot align labels",
        ),
        ([corpus], {"--tokenizer": no_end}, "has no end-of-text token"),
        ([corpus], {"--tokenizer": str(tmp_path / "empty")}, "no tokenizer could be read there"),
        ([corpus], {"--tokenizer": "./nowhere"}, "there is no model folder ./nowhere"),
        (
            [corpus],
            {"--out": str(tmp_path / "theirs")},
            "is not empty and was not made by this command",
        ),
        ([corpus], {"--out": corpus}, "is a file; name a folder"),
        ([corpus], {"--workers": "0"}, "--workers is 0; give at least 1"),
        ([corpus], {"--ray-address": "local"}, "--ray-address needs --ray"),
        (
            [corpus],
            {"--set": "filter.min_chars=3"},
            "unknown key filter.min_chars; did you mean filters.min_chars?",
        ),
        ([corpus], {"--near-duplicate-threshold": "80"}, "give a similarity in (0, 1]"),
        ([corpus], {"--languages": "de"}, "choose from en, zh, mixed"),
        ([corpus], {"--decontaminate": "no.jsonl"}, "there is no benchmark file no.jsonl"),
        ([corpus], {"--lexicon": "no.txt"}, "no.txt"),
        ([corpus], {"--config": "no.yaml"}, "no.yaml: no such settings file"),
        ([corpus], {"--shard": "3"}, "unrecognized arguments: --shard 3; --help lists all options"),
        ([], {}, "the following arguments are required: INPUT"),
    ]
    for inputs, changes, message in mistakes:
        words = [word for pair in {**good, **changes}.items() for word in pair]
        code, _, said = run(capsys, "prepare", *inputs, *words)
        assert code == 2 and message in said, (message, said)
        assert len(said.splitlines()) == 1 and "Traceback" not in said
        assert not (tmp_path / "out").exists()


def test_a_cut_off_file_stops_the_command(
    capsys: pytest.CaptureFixture[str], corpus: str, tokenizer: str, tmp_path: Path
) -> None:
    import gzip

    path = tmp_path / "cut.jsonl.gz"
    # Large enough that the first look does not reach the end.
    rows = Path(corpus).read_bytes() + b'{"text": "short"}\n' * 200_000
    path.write_bytes(gzip.compress(rows)[:-20])
    words = ("--out", str(tmp_path / "out"), "--tokenizer", tokenizer, "--sequence-tokens", "64")
    code, _, said = run(capsys, "prepare", corpus, str(path), *words)
    assert code == 2 and f"{path} is damaged or cut off after line" in said.splitlines()[-1]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], corpus: str, tokenizer: str
) -> None:
    words = ("--tokenizer", tokenizer, "--sequence-tokens", "64")
    code, _, said = run(capsys, "prepare", corpus, "--out", "/proc/nothing", *words)
    assert code == 2 and "/proc/nothing" in said


def test_the_benchmark_of_cleaning_and_of_near_duplicates(
    capsys: pytest.CaptureFixture[str], corpus: str, tmp_path: Path
) -> None:
    chinese = write_jsonl(tmp_path / "zh.jsonl", [{"text": text} for text in texts("zh", 8)])
    sizes = ("--clean-mb", "0.02", "--encode-mb", "0", "--planted", "5")
    code, said, _ = run(capsys, "bench", corpus, chinese, *sizes, "--json")
    measured = json.loads(said)
    assert code == 0
    assert [(s["language"], s["stage"]) for s in measured["speeds"]] == [
        ("en", "clean"),
        ("zh", "clean"),
    ]
    assert all(s["mb_per_core_s"] > 0 and s["peak_rss_mb"] > 30 for s in measured["speeds"])
    assert [found["language"] for found in measured["near_duplicates"]] == ["en", "zh"]
    assert all(found["clear_recall"] > 0.9 for found in measured["near_duplicates"])
    empty = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "words 读书 more 读书 words"}])
    assert run(capsys, "bench", empty)[2].startswith("the inputs hold neither English nor Chinese")


def test_a_full_disk_is_said_in_a_sentence() -> None:
    error = OSError(28, "No space left on device", "/somewhere/x")
    assert sentence(error).startswith(
        "the disk is full at /somewhere/x; free some space and run the same"
    )
    assert (
        sentence(PermissionError(13, "denied", "y"))
        == "no permission for y; change it or name another place"
    )
