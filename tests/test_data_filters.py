from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from fbs_rl.data.decontamination import BenchmarkIndex
from fbs_rl.data.prepare import prepare
from fbs_rl.data.prepare_config import (
    DecontaminationConfig,
    FilterConfig,
    PrepareConfig,
    flat,
    read_config,
)
from fbs_rl.data.shingles import unit_hashes
from fbs_rl.data.text_filters import Removal, first_objection, normalise
from tests.data_corpus import texts, tokenizer_folder, write_jsonl


def test_normal_form() -> None:
    assert normalise("\ufeff a\r\nb\rc\x00\u0007\td e\u0301 \n") == "a\nb\nc\td é"


@pytest.mark.parametrize(
    ("text", "source", "settings", "wanted"),
    [
        ("x" * 10, "", {}, None),
        ("x" * 9, "", {}, Removal.TOO_SHORT),
        ("x" * 101, "", {}, Removal.TOO_LONG),
        ("读" * 10, "", {"languages": ("en",)}, Removal.LANGUAGE),
        ("读" * 10, "", {"languages": ("zh",)}, None),
        ("words 读书 more", "", {"languages": ("en", "zh")}, Removal.LANGUAGE),
        ("words 读书 more", "", {"languages": ("mixed",)}, None),
        ("x" * 10, "wmt-conference/news", {"exclude_sources": ("wmt*",)}, Removal.SOURCE),
        ("x" * 10, "other/wmt", {"exclude_sources": ("wmt*",)}, None),
    ],
)
def test_rules(text: str, source: str, settings: dict[str, Any], wanted: Removal | None) -> None:
    config = FilterConfig(min_chars=10, max_chars=100, **settings)
    assert first_objection(text, source, config)[0] is wanted


QUESTION = (
    "Which of the following animals lays its eggs in the nest of another bird every single spring?"
)
FRAGE = "下列哪一种鸟会把自己的卵产在别的鸟的巢里让它们孵化"


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    path = tmp_path / "bench.jsonl.gz"
    rows = [
        {"question": "Too short?", "answer": "A"},
        {"q": {"text": QUESTION}, "choices": ["a", "b"]},
        {"question": FRAGE},
    ]
    path.write_bytes(gzip.compress(Path(write_jsonl(tmp_path / "b.jsonl", rows)).read_bytes()))
    return str(path)


def test_a_document_that_shares_a_run_with_a_benchmark(benchmark: str, tmp_path: Path) -> None:
    index = BenchmarkIndex.read(DecontaminationConfig((benchmark,)))
    assert index.too_short == 1
    words = QUESTION.rstrip("?").split()
    around = "Some text before it. {} And after."
    assert (
        index.match(unit_hashes(around.format(" ".join(words[2:15]).upper()))) == f"{benchmark}:2"
    )
    assert index.match(unit_hashes(around.format(" ".join(words[2:14])))) is None
    assert index.match(unit_hashes(f"前文，{FRAGE[3:16]}。后文")) == f"{benchmark}:3"
    assert index.match(unit_hashes(f"前文，{FRAGE[3:15]}。后文")) is None
    assert index.match(unit_hashes("short")) is None
    with (tmp_path / "saved").open("wb") as file:
        index.save(file)
    again = BenchmarkIndex.load(tmp_path / "saved")
    assert again.rows == index.rows and again.too_short == 1
    assert again.match(unit_hashes(QUESTION)) == f"{benchmark}:2"


def test_lengths_of_runs_differ_by_language(benchmark: str) -> None:
    index = BenchmarkIndex.read(DecontaminationConfig((benchmark,), ngram_words=5, ngram_chars=20))
    assert index.match(unit_hashes("it lays its eggs in a basket")) is None
    assert index.match(unit_hashes("it lays its eggs in the basket")) == f"{benchmark}:2"
    assert index.match(unit_hashes(FRAGE[:19])) is None
    assert index.match(unit_hashes(FRAGE[:20])) == f"{benchmark}:3"


def test_what_each_filter_removed_is_in_the_manifest(benchmark: str, tmp_path: Path) -> None:
    kept = texts("en", 3)
    rows = [
        {"text": kept[0], "source": "good"},
        "not json",
        {"text": kept[1] + "\n" + QUESTION, "source": "good"},
        {"text": "short"},
        {"text": kept[2], "source": "research only"},
        {"text": texts("zh", 1)[0]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = read_config(
        None,
        [
            f"tokenizer={tokenizer_folder(tmp_path / 'tokenizer')}",
            "sequence_tokens=64",
            f"decontamination.files=[{benchmark}]",
            "filters.languages=[en]",
            "filters.exclude_sources=['research*']",
        ],
    )
    record: Any = prepare(config, [path], tmp_path / "out", unit_bytes=3000).manifest.record
    counts = {
        why: count["documents"] for why, count in record["removed"].items() if count["documents"]
    }
    assert counts == {
        "excluded source": 1,
        "too short": 1,
        "language": 1,
        "shares text with a benchmark": 1,
    }
    assert record["rows"] == 6 and record["kept_by_source"]["good"]["documents"] == 1
    assert record["malformed"]["rows"] == 1
    assert record["malformed"]["first"][0].startswith(f"{path}:2: not JSON")
    example = record["removed_examples"]["shares text with a benchmark"][0]
    assert example["row"] == f"{path}:3" and example["because_of"] == f"{benchmark}:2"
    assert record["removed_examples"]["excluded source"][0]["row"] == f"{path}:5"
    assert record["benchmark_rows_too_short"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sequence_token=64", "unknown key sequence_token; did you mean sequence_tokens"),
        ("filters.min_char=64", r"unknown key filters\.min_char; did you mean filters\.min_chars"),
        ("sequence_tokens=7", "give at least 8"),
        ("sequence_tokens=many", "sequence_tokens is 'many': input should be a valid integer"),
        ("filters=3", "filters is a section"),
        ("filters.languages=[fr]", "choose from en, zh, mixed"),
        ("near_duplicates.threshold=1.5", r"give a similarity in \(0, 1\]"),
        ("heldout_frac=1", r"give a share in \[0, 1\)"),
        ("rows.plain_text_split=page", "choose from file, blank_line, line"),
        ("rows.text_fields=3", r"rows\.text_fields is 3"),
        ("seed", r"not of the form section\.key=value"),
    ],
)
def test_settings_that_cannot_work(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(None, [override])


def test_settings_come_from_a_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("sequence_tokens: 512\nfilters: {min_chars: 10, languages: [zh]}\n")
    config = read_config(str(path), ["filters.min_chars=20", "near_duplicates.threshold=null"])
    assert config.sequence_tokens == 512 and config.filters.min_chars == 20
    assert config.filters.languages == ("zh",) and config.near_duplicates.threshold is None
    with pytest.raises(FileNotFoundError, match="no such settings file"):
        read_config(str(tmp_path / "none.yaml"))
    path.write_text("a: [1")
    with pytest.raises(ValueError, match="not readable YAML"):
        read_config(str(path))


def test_the_default_file_says_what_the_defaults_are() -> None:
    path = Path(__file__).parent.parent / "configs" / "data_default.yaml"
    assert flat(read_config(str(path))) == flat(PrepareConfig())
