from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbs_rl.data.chunk_labels import ChunkLabeller
from fbs_rl.data.document_encoder import PIECE_CHARS, DocumentEncoder
from fbs_rl.data.packing import document_stream, documents_of, join_streams, labels_of, pack_rows
from fbs_rl.data.shards import PackedShards, write_shards
from fbs_rl.types import B_LABEL, I_LABEL, IGNORED_LABEL, S_LABEL
from tests.data_corpus import texts
from tests.small_tokenizer import saveable_tokenizer

END = 1


def pack_by_hand(
    documents: list[list[int]], length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, documents) of each row, token by token."""
    flat = [(n, token) for n, ids in enumerate(documents) for token in [*ids, END]]
    rows, numbers = [], []
    for start in range(0, len(flat), length):
        part = flat[start : start + length]
        first: list[int] = []
        for n, _ in part:
            if n not in first:
                first.append(n)
        missing = length - len(part)
        rows.append([token for _, token in part] + [END] * missing)
        numbers.append([first.index(n) for n, _ in part] + [-1] * missing)
    return rows, numbers


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(2, 99), max_size=30), min_size=1, max_size=12), st.integers(1, 17)
)
def test_rows_equal_those_of_a_simple_packer(documents: list[list[int]], length: int) -> None:
    streams = []
    for ids in documents:
        unlabelled = np.full(len(ids), IGNORED_LABEL, np.int8)
        streams.append(document_stream(ids, unlabelled, np.full(len(ids), -1), END))
    block = pack_rows(join_streams(streams), length, END)
    rows, numbers = pack_by_hand(documents, length)
    assert block.id_BT.tolist() == rows
    assert documents_of(block.mark_BT).tolist() == numbers
    assert (labels_of(block.mark_BT) == IGNORED_LABEL).all()


def mixed_texts() -> list[str]:
    return [text for pair in zip(texts("zh", 4), texts("en", 4), strict=True) for text in pair]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> PackedShards:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    tokenizer = saveable_tokenizer()
    return write_shards(
        folder, {"train": mixed_texts(), "heldout": texts("en", 6)[4:]}, tokenizer, 96, 50
    )


def test_labels_after_packing_are_those_of_the_documents(shards: PackedShards) -> None:
    tokenizer = saveable_tokenizer()
    rows = shards.rows(np.arange(len(shards)))
    kept = rows.document_BT.reshape(-1) >= 0
    ids, labels = rows.ids_BT.reshape(-1)[kept], rows.chunk_label_BT.reshape(-1)[kept]
    place = 0
    labeller = ChunkLabeller()
    for text in mixed_texts():
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        wanted = labeller.label(text, encoded["offset_mapping"]).labels_T
        count = len(encoded["input_ids"])
        assert ids[place : place + count].tolist() == encoded["input_ids"]
        assert (labels[place : place + count] == wanted).all()
        assert ids[place + count] == tokenizer.eos_token_id
        assert labels[place + count] == IGNORED_LABEL
        place += count + 1
    assert place == len(ids)


def test_coverage_of_a_row_counts_its_own_clauses(shards: PackedShards) -> None:
    """Recomputed token by token from the clauses of each document."""
    tokenizer, labeller = saveable_tokenizer(), ChunkLabeller()
    clause: list[tuple[int, int] | None] = []
    label: list[int] = []
    for number, text in enumerate(mixed_texts()):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        made = labeller.label(text, encoded["offset_mapping"])
        clause += [None if c < 0 else (number, c) for c in made.clause_T.tolist()] + [None]
        label += [*made.labels_T.tolist(), IGNORED_LABEL]
    rows = shards.rows(np.arange(len(shards)))
    with_chinese = 0
    for row in range(len(shards)):
        part = slice(row * 96, row * 96 + 96)
        here = list(zip(clause[part], label[part], strict=True))
        spans = {c for c, _ in here if c is not None}
        touched = {c for c, kind in here if c is not None and kind in (B_LABEL, I_LABEL, S_LABEL)}
        chinese = sum(kind != IGNORED_LABEL for _, kind in here)
        assert rows.chinese_frac_B[row] == pytest.approx(chinese / len(here))
        assert np.isnan(rows.coverage_B[row]) == (not spans)
        if spans:
            with_chinese += 1
            assert rows.coverage_B[row] == pytest.approx(len(touched) / len(spans))
    assert 50 < with_chinese < len(shards)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_long_document_has_the_tokens_it_has_in_one_piece(lang: str) -> None:
    tokenizer = saveable_tokenizer()
    encoder = DocumentEncoder.of(tokenizer)
    text = "\n\n".join(texts(lang, 20))
    assert len(text) > 3 * PIECE_CHARS
    stream = encoder.encode(text).stream
    assert stream.id_N[:-1].tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert (documents_of(stream.mark_N[None])[0] == 0).all()
    clauses = stream.clause_N[stream.clause_N >= 0]
    assert (np.diff(clauses) >= 0).all() and (len(clauses) > 0) == (lang == "zh")
    no_break = encoder.encode("字" * (2 * PIECE_CHARS + 5)).stream
    assert tokenizer.decode(no_break.id_N[:-1].tolist()) == "字" * (2 * PIECE_CHARS + 5)


def test_text_that_looks_like_the_end_token_does_not_end_a_document() -> None:
    tokenizer = saveable_tokenizer()
    encoder = DocumentEncoder.of(tokenizer)
    stream = encoder.encode("one <eos> two").stream
    assert stream.id_N.tolist().count(encoder.end_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<eos>") in tokenizer("one <eos> two").input_ids


def test_files_are_found_changed(shards: PackedShards, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    small = write_shards(folder, {"train": texts("en", 2)}, saveable_tokenizer(), 64)
    small.verify()
    path = folder / "train" / "00000.ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"00000\.ids\.npy does not match its digest"):
        PackedShards.open(folder).verify()
    path.write_bytes(bytes(content[:-2]))
    with pytest.raises(ValueError, match="bytes where the manifest says"):
        PackedShards.open(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        PackedShards.open(folder)
