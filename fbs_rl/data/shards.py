"""Packed rows on disk: written once, read through memory maps in any order.

A shard is three .npy files, readable with numpy alone: `ids` [B, T] uint16 (uint32 for vocabularies above
65,536), `marks` [B, T] uint8 and `rows` [B, 2] float32 (fbs_rl/data/packing.py says what they hold).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fbs_rl.data.document_encoder import DocumentEncoder
from fbs_rl.data.manifest import FileEntry, Manifest, ShardEntry, file_sha256
from fbs_rl.data.packing import (
    NO_LABEL,
    STARTS,
    TokenStream,
    documents_of,
    join_streams,
    labels_of,
    pack_rows,
)
from fbs_rl.data.whole_files import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_SHARDS = 256
"""Memory maps kept open at a time: each holds two file descriptors, and 1024 is a common limit."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of a packed data set, ready to become tensors.

    ids_BT: int64 token ids. document_BT: int32 number of the document within the row, from 0; -1 is padding,
    which only the last row of a split may hold. chunk_label_BT: int64 BIOS class, or -100 where there is
    none. coverage_B: float32 share of the row's Chinese spans that a chunk touches; NaN without Chinese.
    chinese_frac_B: float32 share of the row's tokens that are Chinese.
    """

    ids_BT: np.ndarray
    document_BT: np.ndarray
    chunk_label_BT: np.ndarray
    coverage_B: np.ndarray
    chinese_frac_B: np.ndarray


class PackedShards:
    """One split of a prepared folder, as a sequence of rows. Pickles as the folder's name."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self._shards = manifest.splits[split]
        self._first_row = np.cumsum([0] + [shard.sequences for shard in self._shards])
        self._maps: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> PackedShards:
        """The split, after a look at the manifest and at the size of every file.

        Raises FileNotFoundError for an unfinished folder or a missing file, ValueError for a wrong size,
        a damaged manifest or an unknown split.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if split not in manifest.splits:
            raise ValueError(
                f"{folder} has no split {split!r}; it has {', '.join(sorted(manifest.splits))}"
            )
        for file in (file for shard in manifest.splits[split] for file in shard.files):
            path = folder / file.name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; copy or prepare the folder again")
            if path.stat().st_size != file.bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes where the manifest says {file.bytes}; "
                    f"copy or prepare the folder again"
                )
        return cls(folder, split, manifest)

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return (PackedShards.open, (self.folder, self.split))

    def __len__(self) -> int:
        return int(self._first_row[-1])

    @property
    def sequence_tokens(self) -> int:
        return self.manifest.sequence_tokens

    @property
    def vocabulary(self) -> int:
        return self.manifest.vocabulary

    @property
    def tokenizer(self) -> str:
        return self.manifest.tokenizer

    @property
    def tokenizer_digest(self) -> str:
        return self.manifest.tokenizer_digest

    @property
    def digest(self) -> str:
        """sha256 over the digests of all files of the folder, both splits."""
        return self.manifest.digest

    def verify(self) -> None:
        """Read every file of the split; ValueError naming the first that does not match its digest."""
        for file in (file for shard in self._shards for file in shard.files):
            if file_sha256(self.folder / file.name) != file.sha256:
                raise ValueError(
                    f"{self.folder / file.name} does not match its digest; copy or prepare the folder again"
                )

    def rows(self, indices: np.ndarray | Sequence[int]) -> PackedRows:
        """The rows at `indices`, in that order; IndexError for one outside [0, len)."""
        wanted_B = np.asarray(indices, dtype=np.int64)
        outside_B = (wanted_B < 0) | (wanted_B >= len(self))
        if outside_B.any():
            raise IndexError(
                f"row {wanted_B[outside_B][0]} of {len(self)} in {self.folder}/{self.split}"
            )
        id_BT = np.empty((len(wanted_B), self.sequence_tokens), dtype=np.int64)
        mark_BT = np.empty(id_BT.shape, dtype=np.uint8)
        row_B2 = np.empty((len(wanted_B), 2), dtype=np.float32)
        shard_B = np.searchsorted(self._first_row, wanted_B, side="right") - 1
        for shard in np.unique(shard_B):
            here_B = shard_B == shard
            local = wanted_B[here_B] - self._first_row[shard]
            ids, marks, measures = self._map(int(shard))
            id_BT[here_B], mark_BT[here_B], row_B2[here_B] = (
                ids[local],
                marks[local],
                measures[local],
            )
        return PackedRows(
            ids_BT=id_BT,
            document_BT=documents_of(mark_BT),
            chunk_label_BT=labels_of(mark_BT),
            coverage_B=row_B2[:, 0].copy(),
            chinese_frac_B=row_B2[:, 1].copy(),
        )

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        entry = self._shards[shard]
        ids, marks = (
            np.load(self.folder / file.name, mmap_mode="r") for file in (entry.ids, entry.marks)
        )
        self._maps[shard] = (ids, marks, np.load(self.folder / entry.rows.name))
        if len(self._maps) > OPEN_SHARDS:
            self._maps.popitem(last=False)
        return self._maps[shard]


def id_dtype(vocabulary: int) -> np.dtype:
    """The narrowest type that holds every token id."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def write_shard(
    folder: Path,
    split: str,
    number: int,
    blocks: Iterable[TokenStream],
    tokens: int,
    sequence_tokens: int,
    vocabulary: int,
    end_token_id: int,
) -> ShardEntry:
    """Pack `tokens` tokens into shard `number` of a split, each file whole or not at all.

    blocks: the stream in parts, each but the last a whole number of rows.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows = -(-tokens // sequence_tokens)
    kinds = {
        "ids": ((rows, sequence_tokens), id_dtype(vocabulary)),
        "marks": ((rows, sequence_tokens), np.dtype(np.uint8)),
        "rows": ((rows, 2), np.dtype(np.float32)),
    }
    documents = chinese = done = 0
    with ExitStack() as stack:
        names = {kind: folder / split / f"{number:05d}.{kind}.npy" for kind in kinds}
        files = {kind: stack.enter_context(whole_file(name)) for kind, name in names.items()}
        for kind, (shape, dtype) in kinds.items():
            header = {
                "shape": shape,
                "fortran_order": False,
                "descr": np.lib.format.dtype_to_descr(dtype),
            }
            np.lib.format.write_array_header_1_0(files[kind], header)
        for block in blocks:
            packed = pack_rows(block, sequence_tokens, end_token_id)
            for kind, array in zip(
                kinds, (packed.id_BT, packed.mark_BT, packed.row_B2), strict=True
            ):
                files[kind].write(array.astype(kinds[kind][1], copy=False).tobytes())
            documents += int(np.count_nonzero(block.mark_N & STARTS))
            chinese += int(np.count_nonzero(block.mark_N & NO_LABEL != NO_LABEL))
            done += len(packed.id_BT)
    assert done == rows
    entries = {kind: _entry(name, folder) for kind, name in names.items()}
    return ShardEntry(rows, tokens, documents, chinese, **entries)


def _entry(path: Path, folder: Path) -> FileEntry:
    name = path.relative_to(folder).as_posix()
    return FileEntry(name, path.stat().st_size, file_sha256(path))


def write_shards(
    folder: str | Path,
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    shard_rows: int = 1024,
    tokenizer_name: str = "in memory",
) -> PackedShards:
    """Shards of a few texts, made in this process in the order given; the "train" split is returned.

    texts: the documents of each split, such as {"train": [...], "heldout": [...]}. Nothing is filtered or
    shuffled; that is what `python -m fbs_rl.data prepare` is for.

    Raises FileExistsError if the folder holds a manifest already, ValueError for a tokenizer without
    offsets or end token.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        raise FileExistsError(f"{folder} holds prepared data already; name a new folder")
    encoder = DocumentEncoder.of(tokenizer)
    splits: dict[str, tuple[ShardEntry, ...]] = {}
    for split, documents in texts.items():
        stream = join_streams([encoder.encode(text).stream for text in documents])
        span = shard_rows * sequence_tokens
        starts = range(0, len(stream), span)
        splits[split] = tuple(
            write_shard(
                folder=folder,
                split=split,
                number=number,
                blocks=[stream.part(start, start + span)],
                tokens=len(stream.part(start, start + span)),
                sequence_tokens=sequence_tokens,
                vocabulary=encoder.vocabulary,
                end_token_id=encoder.end_token_id,
            )
            for number, start in enumerate(starts)
        )
    Manifest(
        sequence_tokens=sequence_tokens,
        vocabulary=encoder.vocabulary,
        tokenizer=tokenizer_name,
        tokenizer_digest=encoder.digest,
        end_token_id=encoder.end_token_id,
        splits=splits,
        record={},
    ).write(folder)
    return PackedShards.open(folder, next(iter(splits)))
