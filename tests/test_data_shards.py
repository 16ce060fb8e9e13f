from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from fbs_rl.data import shards as shards_module
from fbs_rl.data.manifest import MANIFEST
from fbs_rl.data.packing import TokenStream
from fbs_rl.data.shards import PackedShards, id_dtype, write_shard, write_shards
from tests.data_corpus import texts
from tests.small_tokenizer import saveable_tokenizer

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards") / "data"
    documents = texts("en", 12)
    write_shards(
        made, {"train": documents[:8], "heldout": documents[8:]}, saveable_tokenizer(), LENGTH, 40
    )
    return made


def test_rows_come_in_the_order_asked_for_across_shards(folder: Path) -> None:
    data = PackedShards.open(folder)
    assert len(data.manifest.splits["train"]) > 2
    everything = data.rows(np.arange(len(data)))
    wanted = np.random.default_rng(0).permutation(len(data))[:50]
    wanted = np.append(wanted, wanted[:3])  # a row may be asked for twice
    some = data.rows(wanted)
    assert (some.ids_BT == everything.ids_BT[wanted]).all()
    assert (some.document_BT == everything.document_BT[wanted]).all()
    assert (some.chunk_label_BT == everything.chunk_label_BT[wanted]).all()
    assert np.array_equal(some.coverage_B, everything.coverage_B[wanted], equal_nan=True)
    assert some.ids_BT.dtype == np.int64 and some.document_BT.dtype == np.int32
    assert some.chunk_label_BT.dtype == np.int64 and some.coverage_B.dtype == np.float32


def test_text_comes_back_whole(folder: Path) -> None:
    tokenizer = saveable_tokenizer()
    data = PackedShards.open(folder, "heldout")
    rows = data.rows(range(len(data)))
    ids = rows.ids_BT.reshape(-1)[rows.document_BT.reshape(-1) >= 0]
    assert tokenizer.decode(ids.tolist()).split("<eos>")[:-1] == texts("en", 12)[8:]


def test_only_the_last_row_is_padded(folder: Path) -> None:
    for split in ("train", "heldout"):
        data = PackedShards.open(folder, split)
        padding = data.rows(range(len(data))).document_BT < 0
        assert not padding[:-1].any()


def test_shards_travel_to_another_process_by_name(folder: Path) -> None:
    data = PackedShards.open(folder)
    data.rows([0])
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 1000
    assert (again.rows([5]).ids_BT == data.rows([5]).ids_BT).all()


def test_few_maps_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 1)
    data = PackedShards.open(folder)
    everything = data.rows(range(len(data)))
    assert len(data._maps) == 1
    assert (data.rows([0]).ids_BT == everything.ids_BT[:1]).all()


@pytest.mark.parametrize("row", [-1, 10**6])
def test_a_row_that_is_not_there(folder: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of"):
        PackedShards.open(folder).rows([0, row])


def test_manifest_says_what_the_files_hold(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    data = PackedShards.open(folder)
    tokenizer = saveable_tokenizer()
    assert content["splits"]["train"]["documents"] == 8
    assert content["splits"]["train"]["sequences"] == len(data)
    assert content["digest"] == data.digest
    assert data.vocabulary == len(tokenizer) and data.sequence_tokens == LENGTH
    counted = sum(len(tokenizer(text).input_ids) + 1 for text in texts("en", 8))
    assert content["splits"]["train"]["tokens"] == counted


def test_a_manifest_that_was_edited_is_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["splits"]["train"]["shards"][0]["ids"]["sha256"] = "0" * 64
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="digest does not match what it lists"):
        PackedShards.open(tmp_path)


def test_folders_that_are_not_finished(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        PackedShards.open(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; it has heldout, train"):
        PackedShards.open(folder, "test")
    with pytest.raises(FileExistsError, match="name a new folder"):
        write_shards(folder, {"train": ["x"]}, saveable_tokenizer(), LENGTH)


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    assert id_dtype(2**16) == np.uint16 and id_dtype(2**16 + 1) == np.uint32
    ids = np.array([70_000, 3, 99_999, 1], np.uint32)
    stream = TokenStream(ids, np.array([15, 7, 7, 7], np.uint8), np.full(4, -1, np.int32))
    entry = write_shard(tmp_path, "train", 0, [stream], 4, 4, 100_000, 1)
    assert np.load(tmp_path / entry.ids.name).tolist() == [ids.tolist()]
    assert (entry.sequences, entry.tokens, entry.documents) == (1, 4, 1)


def test_an_empty_split_can_be_opened(tmp_path: Path) -> None:
    write_shards(
        tmp_path / "x", {"train": texts("en", 1), "heldout": []}, saveable_tokenizer(), LENGTH
    )
    assert len(PackedShards.open(tmp_path / "x", "heldout")) == 0
