from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from fbs_rl.data.inputs import find_inputs, plan_units
from fbs_rl.data.prepare_config import RowConfig
from fbs_rl.data.readers import PieceReader, Row, expansion, format_of
from tests.data_corpus import texts, write_jsonl

CONFIG = RowConfig()
Pack = Callable[[bytes], bytes]
PACKINGS: dict[str, Pack] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path: str | Path, config: RowConfig = CONFIG, unit_bytes: int = 2**26) -> list[Row]:
    """All rows; lines counted within their piece."""
    units = plan_units(find_inputs([str(path)], config), unit_bytes)
    return [row for unit in units for piece in unit.pieces for row in PieceReader(piece, config)]


@pytest.mark.parametrize("ending", PACKINGS)
def test_jsonl(tmp_path: Path, ending: str) -> None:
    documents = texts("zh", 5) + texts("en", 5)
    content = "".join(
        json.dumps({"text": t, "source": f"s{n}"}) + "\n" for n, t in enumerate(documents)
    )
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKINGS[ending](content.encode()))
    rows = read(path)
    assert [row.text for row in rows] == documents
    assert [row.source for row in rows] == [f"s{n}" for n in range(10)]
    assert [row.line for row in rows] == list(range(1, 11))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_several_parts(tmp_path: Path, ending: str) -> None:
    """What `cat a.gz b.gz` makes, with an empty part between."""
    parts = [b'{"text": "one"}\n', b"", b'{"text": "two"}\n']
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(PACKINGS[ending](part) for part in parts))
    assert [row.text for row in read(path)] == ["one", "two"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("lost", [1, 9, 500])
def test_a_compressed_file_that_was_cut_off_is_an_error(
    tmp_path: Path, ending: str, lost: int
) -> None:
    content = "".join(json.dumps({"text": t}) + "\n" for t in texts("en", 20)).encode()
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKINGS[ending](content)[:-lost])
    with pytest.raises(ValueError, match=rf"a\.jsonl{ending} is damaged or cut off"):
        read(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(b'{"text": "plain"}\n' * 9)
    with pytest.raises(ValueError, match="is damaged or cut off"):
        read(tmp_path / f"a.jsonl{ending}")


def test_a_damaged_gz_is_an_error(tmp_path: Path) -> None:
    content = bytearray(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts("en", 20)).encode())
    )
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged or cut off"):
        read(tmp_path / "a.jsonl.gz")


MALFORMED = [
    ('{"text": "good"}', ""),
    ('{"text": "cut o', "not JSON"),
    ("[1, 2]", "not a JSON object but a list"),
    ('{"content": "other"}', "no field 'text'"),
    ('{"text": null}', "is not text but null"),
    ('{"text": 7}', "is not text but a number"),
    (r'{"text": "half \ud83d"}', "surrogate"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    ("[" * 50_000, "not JSON"),
    ('{"text": "' + "x" * 70_000 + '"}', "longer than 65536 bytes"),
    ('{"text": "good too"}', ""),
]


@pytest.mark.parametrize("ending", PACKINGS)
def test_every_malformed_row_is_named_and_skipped(tmp_path: Path, ending: str) -> None:
    plain = Path(write_jsonl(tmp_path / "plain.jsonl", [row for row, _ in MALFORMED]))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKINGS[ending](plain.read_bytes()))
    rows = read(path, RowConfig(max_bytes=2**16))
    assert [row.line for row in rows] == list(range(1, len(MALFORMED) + 1))
    for row, (_, problem) in zip(rows, MALFORMED, strict=True):
        assert (row.text is None) == bool(problem)
        assert problem in row.problem


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert [(r.line, r.text) for r in read(tmp_path / "a.jsonl")] == [(1, "a"), (4, "b")]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
def test_byte_ranges_give_every_row_once(tmp_path: Path, unit_bytes: int) -> None:
    wanted = [f"{n} " + "x" * (n * 7 % 50) for n in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in wanted])
    units = plan_units(find_inputs([path], CONFIG), unit_bytes)
    pieces = [piece for unit in units for piece in unit.pieces]
    assert len(pieces) == -(-Path(path).stat().st_size // unit_bytes)
    readers = [PieceReader(piece, CONFIG) for piece in pieces]
    assert [row.text for reader in readers for row in reader] == wanted
    assert sum(reader.lines for reader in readers) == len(wanted)


def write_parquet(path: Path, rows: list[str | None], group: int = 3) -> str:
    table = arrow.table({"n": list(range(len(rows))), "content": rows, "source": ["s"] * len(rows)})
    parquet.write_table(table, path, row_group_size=group)
    return str(path)


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_parquet(tmp_path: Path, unit_bytes: int) -> None:
    documents = [*texts("zh", 5), None, *texts("en", 5)]
    path = write_parquet(tmp_path / "a.parquet", documents)
    rows = read(path, unit_bytes=unit_bytes)
    assert [row.text for row in rows] == documents
    assert rows[0].source == "s" and "is not text but null" in rows[5].problem
    units = plan_units(find_inputs([path], CONFIG), unit_bytes)
    firsts = [piece.first_row for unit in units for piece in unit.pieces]
    assert firsts == ([0, 3, 6, 9] if unit_bytes == 1 else [0])


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"title": ["x"]}), path)
    with pytest.raises(
        ValueError, match=r"no text column: it has title; name one with rows\.text_fields"
    ):
        read(path)
    parquet.write_table(arrow.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"the column text of .* holds int64, not text"):
        read(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read(path)


PLAIN = "One.\nTwo.\n\n\nThree.\n   \nFour,\nfive."


@pytest.mark.parametrize("ending", PACKINGS)
@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("file", [(1, PLAIN)]),
        ("line", [(1, "One.\n"), (2, "Two.\n"), (5, "Three.\n"), (7, "Four,\n"), (8, "five.")]),
        ("blank_line", [(1, "One.\nTwo.\n"), (5, "Three.\n"), (7, "Four,\nfive.")]),
    ],
)
def test_plain_text(tmp_path: Path, ending: str, split: str, wanted: list[tuple[int, str]]) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKINGS[ending](PLAIN.encode()))
    assert [(r.line, r.text) for r in read(path, RowConfig(plain_text_split=split))] == wanted


def test_a_text_file_too_large_for_one_document(tmp_path: Path) -> None:
    for ending, pack in PACKINGS.items():
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(pack(b"x" * 5000))
        with pytest.raises(ValueError, match=r"set rows\.plain_text_split to blank_line or line"):
            read(path, RowConfig(max_bytes=2000))


def test_inputs_are_files_folders_and_patterns_each_file_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.csv", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": "x"}])

    def names(*words: str) -> list[str]:
        return [Path(f.path).name for f in find_inputs([str(tmp_path / w) for w in words], CONFIG)]

    assert names("b.jsonl", "") == ["b.jsonl", "a.jsonl", "c.jsonl"]
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl", "a.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_the_first_field_of_the_list_that_a_file_has_is_its_text(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", ["broken", {"body": "b", "content": "c"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "t", "content": "c"}])
    assert [f.text_field for f in find_inputs([a, b], CONFIG)] == ["content", "text"]
    assert [f.text_field for f in find_inputs([a], RowConfig(text_fields=("body",)))] == ["body"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", r"unknown extension; known are \.jsonl"),
        ("a.parquet.gz", b"x", "unknown extension"),
        (
            "a.jsonl",
            b'{"title": 1, "body_text": 2}\n',
            "its rows have title, body_text; name one with",
        ),
        ("a.json", b'[{"text": "x"}]', "is one JSON array; write one object a line"),
        ("a.jsonl.gz", b"", "is empty, which no .gz file is"),
    ],
)
def test_files_that_cannot_be_inputs(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_inputs([str(tmp_path / name)], CONFIG)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("missing.jsonl", "there is no file"),
        ("*.jsonl", "no file matches"),
        ("", "holds no file with a known extension"),
    ],
)
def test_inputs_that_are_not_there(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        find_inputs([str(tmp_path / word)], CONFIG)
    with pytest.raises(FileNotFoundError, match=r"for a data set of the hub write hf:allenai/c4"):
        find_inputs(["allenai/c4"], CONFIG)


def test_how_much_a_compressed_file_holds(tmp_path: Path) -> None:
    content = "".join(texts("en", 40)).encode() * 12
    assert len(content) > 2**21
    for ending, pack in PACKINGS.items():
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(pack(content))
        true = len(content) / path.stat().st_size
        if ending == ".zst":
            assert expansion(str(path), ending) > 1  # its window reaches over the repeats
        else:
            assert expansion(str(path), ending) == pytest.approx(true, rel=0.2)


def test_formats_by_name() -> None:
    assert [format_of(n)[1] for n in ("A.JSONL.GZ", "b.txt.zst", "c.md")] == [".gz", ".zst", ""]
